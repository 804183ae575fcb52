"""Small data sets with real image files, laid out as the real ones are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def picture(label: int, number: int, size: tuple[int, int] = (60, 45)) -> Image.Image:
    """Returns an RGB picture (width, height) of coarse noise, whose colour tells its label."""
    generator = np.random.default_rng([label, number])
    coarse = generator.integers(0, 90, (6, 8, 3)) + np.array([[160, 0, 0], [0, 160, 0], [0, 0, 160]])[label % 3]
    return Image.fromarray(coarse.astype(np.uint8)).resize(size)


def make_class_folders(folder: Path, splits: dict[str, int], classes: tuple[str, ...] = WORDNET_IDS) -> None:
    """Makes `folder/<split>/<class>/*.JPEG` with so many pictures per class; as in ImageNet, one is gray, one CMYK."""
    for split, per_class in splits.items():
        for label, name in enumerate(classes):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(per_class):
                mode = {(0, 0): "L", (1, 0): "CMYK"}.get((label, number), "RGB")
                picture(label, number, (60 + 4 * label, 45 + 8 * number)).convert(mode).save(
                    place / f"{name}_{number}.JPEG", "JPEG"
                )


def make_cifar10(folder: Path, per_batch: int) -> None:
    """Makes the files of CIFAR-10's Python version, which torchvision reads: five batches, and one to evaluate on."""
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for part, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [number % 10 for number in range(per_batch)]
        pixels = [np.asarray(picture(label, 10 * part + label, (32, 32))) for label in labels]
        data = np.stack([p.transpose(2, 0, 1).reshape(-1) for p in pixels])  # planes of red, green and blue
        (place / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def make_voc(root: Path, splits: dict[str, int], size: tuple[int, int] = (48, 40)) -> None:
    """Makes `root/VOCdevkit/VOC2012` with so many pictures per split, as torchvision's `VOCSegmentation` reads it.

    A picture (JPEG) of noise has a red box and a blue disc; its mask (palette PNG) calls these 1 and 2, all else 0 and
    a rim of two pixels around each 255.
    """
    place = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    width, height = size
    for part, (split, num_pictures) in enumerate(splits.items()):
        names = [f"{split}_{number:06d}" for number in range(num_pictures)]
        (place / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            generator = np.random.default_rng([part, number])
            noise = generator.integers(60, 160, (height, width, 3), dtype=np.uint8)
            image, mask = Image.fromarray(noise), Image.new("P", size)
            mask.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 128] + [224, 224, 192] * 253)
            for label, colour in ((1, (200, 40, 40)), (2, (40, 40, 200))):
                side = int(generator.integers(10, 18))
                left, top = int(generator.integers(2, width - side - 2)), int(generator.integers(2, height - side - 2))
                box = (left, top, left + side, top + side)
                drawn, labelled = ImageDraw.Draw(image), ImageDraw.Draw(mask)
                if label == 1:
                    drawn.rectangle(box, fill=colour)
                    labelled.rectangle(box, fill=label, outline=255, width=2)
                else:
                    drawn.ellipse(box, fill=colour)
                    labelled.ellipse(box, fill=label, outline=255, width=2)
            image.save(place / "JPEGImages" / f"{name}.jpg", quality=95)
            mask.save(place / "SegmentationClass" / f"{name}.png")


Drawn = tuple[tuple[int, ...], int, int]  # box (x, y, width, height), category id, whether it is a crowd
SHAPES = {3: "square", 7: "disc"}  # COCO's category ids have gaps, too


def make_coco(folder: Path, splits: dict[str, int], size: tuple[int, int] = (64, 64)) -> None:
    """Makes `folder/<split>/*.jpg` and `folder/annotations/instances_<split>.json`: squares and discs on noise.

    Every fifth picture is empty. The second has a crowd and a box without width, which cover nothing that is drawn.
    """
    (folder / "annotations").mkdir(parents=True)
    for split, num_pictures in splits.items():
        (folder / split).mkdir()
        generator = np.random.default_rng(len(split))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, num_pictures + 1):
            width, height = size[0], size[1] + 8 * (number % 3)
            pixels = generator.integers(0, 80, (height, width, 3)).astype(np.uint8)
            boxes = [] if number % 5 == 0 else _draw_shapes(pixels, generator)
            if number == 2:
                boxes += [((0, 0, 12, 12), 3, 1), ((20, 20, 0, 9), 7, 0)]
            name = f"{number:012}.jpg"
            Image.fromarray(pixels).save(folder / split / name, quality=95)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for box, category, is_crowd in boxes:
                x, y, w, h = box
                outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": is_crowd,
                        "segmentation": {"counts": [height * width], "size": [height, width]} if is_crowd else outline,
                    }
                )
        categories = [{"id": key, "name": name} for key, name in SHAPES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _draw_shapes(pixels: np.ndarray, generator: np.random.Generator) -> list[Drawn]:
    """Draws one or two shapes; returns their boxes (x, y, width, height), category ids, and whether they are crowds."""
    height, width = pixels.shape[:2]
    found: list[Drawn] = []
    for half in range(int(generator.integers(1, 3))):
        side = int(generator.integers(18, 28))
        x = int(generator.integers(half * width // 2, (half + 1) * width // 2 - side + 1))
        y = int(generator.integers(0, height - side + 1))
        category = int(generator.choice(list(SHAPES)))
        rows, columns = np.mgrid[0:side, 0:side] - (side - 1) / 2
        inside = np.hypot(rows, columns) <= side / 2 if category == 7 else np.ones((side, side), dtype=bool)
        pixels[y : y + side, x : x + side][inside] = (230, 60, 40) if category == 3 else (40, 120, 230)
        found.append(((x, y, side, side), category, 0))
    return found
