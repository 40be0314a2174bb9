"""Reading images: decoded and processed each time, and from the cache of processed images.

    python -m benchmarks.images --json runs/bench/images.json

Photo-like JPEGs of 640 x 480 through the image processors of LLaVA-1.5 (336 x 336) and Qwen2.5-VL
(its own size), PIL-backed; one process. `first`: with the cache still empty.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.table import Table
from transformers import Qwen2VLImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.measure import save
from mmkd.data.image_cache import ImageCache
from mmkd.data.images import load_image
from mmkd.runtime.progress import console

SIZE = (640, 480)
PROCESSORS: dict[str, Callable[[], Any]] = {
    "LLaVA-1.5": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ),
    "Qwen2.5-VL": Qwen2VLImageProcessorPil,
}


def write_photos(folder: Path, count: int) -> list[str]:
    """Blurred noise: as many bytes as a photo, and as long to decode."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
        blurred = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))
        blurred.save(folder / f"{number}.jpg", quality=85)
    return [f"{number}.jpg" for number in range(count)]


def per_second(read: Callable[[str], Any], names: list[str]) -> float:
    started = time.perf_counter()
    for name in names:
        read(name)
    return len(names) / (time.perf_counter() - started)


def measure(make: Callable[[], Any], count: int) -> dict[str, float]:
    """Images a second, and bytes on the disk of each."""
    with tempfile.TemporaryDirectory() as folder:
        root, kept = Path(folder), Path(folder) / "kept"
        names = write_photos(root, count)
        own = make()
        cache = ImageCache(kept, own)
        settings = {"return_tensors": "pt"}

        def cached(name: str) -> Any:
            return cache([[cache.picture(name, root)]], **settings)

        return {
            "processed": per_second(lambda n: own([load_image(n, root)], **settings), names),
            "first": per_second(cached, names),
            "cached": per_second(cached, names),
            "bytes": sum(p.stat().st_size for p in kept.rglob("*.safetensors")) / count,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(make, args.count) for name, make in PROCESSORS.items()}
    table = Table(title="images a second")
    for name in ("", "processed", "first", "cached", "cached / processed", "MB each"):
        table.add_column(name, justify="right")
    for name, f in found.items():
        speeds = [f"{f[k]:.0f}" for k in ("processed", "first", "cached")]
        table.add_row(
            name, *speeds, f"{f['cached'] / f['processed']:.1f}", f"{f['bytes'] / 1e6:.2f}"
        )
    console.print(table)
    save(args, pictures=found)


if __name__ == "__main__":
    main()
