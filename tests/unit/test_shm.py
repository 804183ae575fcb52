"""Loading does not use /dev/shm, which is tiny in many containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import nightly

SCRIPT = """
    import os, sys
    import torch
    from trainer.config import load_config
    from trainer.data.feed import DeviceFeed
    from trainer.data.sampler import BatchPlan, StepSampler
    from trainer.tasks.classification import Classification

    class Wide:
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.full((3, 256, 256), float(index)), index % 3  # 0.75 MiB

    disk = os.statvfs("/dev/shm")
    assert disk.f_blocks * disk.f_frsize == 64 << 10, "this is not the tiny one"
    config = load_config(sys.argv[1], ["data.workers=2", "data.transforms.train=[]"]).data
    feed = DeviceFeed(Wide(), config, "train", torch.device("cpu"), 0, Classification())
    feed.start(StepSampler(BatchPlan.split(24, 8, None, 1, False), 0, 0), 0, 9)
    for step in range(9):
        for batch in feed.step_batches(step):
            images = batch.data[0]
            assert images.shape == (8, 3, 256, 256)
            assert (images == batch.sample_ids[:, None, None, None]).all()
            assert os.listdir("/dev/shm") == []
    feed.close()
    print("loaded")
"""


@nightly
def test_batches_of_megabytes_with_a_tiny_dev_shm(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace of one's own is not permitted here")
    root = request.config.rootpath
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"'
    outcome = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, str(script), str(root / "configs/digits.yaml")],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (outcome.returncode, outcome.stdout) == (0, "loaded\n"), outcome.stderr
