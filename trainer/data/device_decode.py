"""JPEGs decoded on the device: workers only read files, nvImageCodec decodes whole batches (nvJPEG on a GPU).

Owns the decoder. Crops are `trainer.data.device_crop`; what cannot be decoded on the device goes the way of the host,
in `trainer.data.loader`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.decode import CPU_ONLY, codec, is_whole_jpeg
from trainer.data.device_crop import crop_resize
from trainer.data.draws import sample_keys
from trainer.data.geometry import Crops
from trainer.data.loader import LoadedBatch, SampleLoader
from trainer.data.nested import map_tensors
from trainer.data.sampler import SampleKey
from trainer.errors import UserError


class DeviceDecoder:
    """Decodes and crops batches on one device.

    Args:
        device: a CUDA device, or the CPU, where the same code runs through libjpeg-turbo.
    """

    def __init__(self, device: torch.device) -> None:
        library = codec()
        assert library is not None
        self.device = device
        self._library = library
        if device.type == "cuda":
            self._decoder = library.Decoder(device_id=device.index or 0)
        else:
            backends = [library.Backend(library.BackendKind.CPU_ONLY)]
            self._decoder = library.Decoder(device_id=CPU_ONLY, backends=backends, max_num_cpu_threads=1)
        self._params = library.DecodeParams(apply_exif_orientation=False)

    def decode(self, files: Sequence[NDArray[np.uint8]]) -> list[torch.Tensor | None]:
        """Returns pixels (h, w, 3) uint8 on the device for each file; None where it cannot decode one."""
        streams: list[Any] = []
        for file in files:
            try:
                data = file.tobytes()
                streams.append(self._library.CodeStream(data) if is_whole_jpeg(data) else None)
            except RuntimeError:
                streams.append(None)
        known = [stream for stream in streams if stream is not None]
        stream_handle = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        images = iter(self._decoder.decode(known, params=self._params, cuda_stream=stream_handle) if known else [])
        decoded = [None if stream is None else next(images) for stream in streams]
        return [None if image is None else self._as_tensor(image) for image in decoded]

    def crop(
        self, files: Sequence[NDArray[np.uint8]], crops: Crops, otherwise: Callable[[int], NDArray[np.uint8] | None]
    ) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Returns the crops of a batch, uint8 (n, 3, height, width) in channels_last, and which pictures they are of.

        Args:
            files: the bytes of each picture.
            crops: of one output size.
            otherwise: asked for the crop (height, width, 3) of a picture that cannot be decoded here; None leaves
                it out.
        """
        size = int(crops.sizes[0, 0]), int(crops.sizes[0, 1])
        result = torch.empty((len(files), *size, 3), dtype=torch.uint8, device=self.device)
        pictures = self.decode(files)
        here = np.array([i for i, picture in enumerate(pictures) if picture is not None], dtype=np.int64)
        if len(here):
            decoded = [picture for picture in pictures if picture is not None]
            cropped = crop_resize(decoded, crops.boxes[here], size)
            result[torch.from_numpy(here).to(self.device)] = cropped.permute(0, 2, 3, 1)
        kept = set(here.tolist())
        for i in sorted(set(range(len(files))) - kept):
            pixels = otherwise(i)
            if pixels is not None:
                result[i] = torch.from_numpy(np.array(pixels)).to(self.device)
                kept.add(i)
        rows = np.array(sorted(kept), dtype=np.int64)
        if len(rows) < len(files):
            result = result[torch.from_numpy(rows).to(self.device)]
        return result.permute(0, 3, 1, 2), rows

    def finish(self, batch: LoadedBatch, loader: SampleLoader, seed: int) -> LoadedBatch:
        """Decodes and crops a batch of `SampleLoader.load_encoded`; its data become [images, targets] on the device.

        Raises:
            UserError: a picture cannot be decoded, and the loader's rule is to raise.
        """
        if not len(batch.keys):
            return batch
        assert loader.geometry is not None
        encoded, targets = batch.data
        targets = map_tensors(torch.clone, targets)  # their memory is the worker's
        keys, skipped, files = batch.keys.copy(), list(batch.skipped), encoded.files()
        crops = loader.geometry(encoded.sizes, sample_keys(seed, keys))
        if (crops.sizes != crops.sizes[0]).any():
            message = "its pictures differ in size; make them equal with a resize or crop"
            raise UserError(message, path="data.transforms")
        size = int(crops.sizes[0, 0]), int(crops.sizes[0, 1])

        def decode_on_host(i: int) -> NDArray[np.uint8] | None:
            key = SampleKey(*map(int, keys[i]))
            done = loader.decode_on_host(key, files[i].tobytes(), None, crops.boxes[i], size, skipped)
            if done is None:
                return None
            taken, pixels, target = done
            if taken != key:
                keys[i] = taken
                targets[i] = torch.as_tensor(target)
            return np.asarray(pixels)

        images, rows = self.crop(files, crops, decode_on_host)
        targets = map_tensors(lambda tensor: tensor[torch.from_numpy(rows)].to(self.device), targets)
        return LoadedBatch(keys[rows], [images, targets], tuple(skipped))

    def _as_tensor(self, image: Any) -> torch.Tensor:
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
            return torch.from_dlpack(image.to_dlpack(cuda_stream=stream))  # without copying
        return torch.from_numpy(np.asarray(image))
