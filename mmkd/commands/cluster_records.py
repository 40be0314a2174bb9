"""`mmkd data score --clusters K`: groups of training records whose images look alike to a model.

A record's features are the mean of its image tokens as they enter the decoder, after vision tower
and connector, scaled to length 1. Tokens of all its images count alike.

    OUT.parts/images/MODEL-RANK.jsonl   features of the records, base64 of float32
"""

import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.commands.score_passes import Block, Row, Scores, batch_of, journal_rows, run_pass
from mmkd.commands.scored_models import ScoredModel, request_of
from mmkd.data.batch import Batch
from mmkd.data.clusters import TooFewPointsError, clusters
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.evaluation.calibration import inputs_as
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.recipe import DataConfig
from mmkd.runtime import distributed
from mmkd.runtime.progress import say
from mmkd.teachers import LiveTeacher

FOLDER = "images"
FIRST_LAYER = CaptureRequest(layers=frozenset({0}), outputs=False)
"""The decoder stops after its first layer: only its input is read."""


@dataclass(frozen=True)
class Features:
    """Features of the images of records.

    Attributes:
        records: id and key of each of N records; None for the key of a bad one.
        points: {index of the record: [D] float32}, for records with images.
    """

    records: list[tuple[str, str | None]]
    points: dict[int, np.ndarray]


@dataclass(frozen=True)
class Grouped:
    """Clusters of records.

    Attributes:
        records: as in `Features`.
        labels: [N] float64, the cluster of each record, NaN for bad ones.
        facts: of the file of scores, as `mmkd.data.score_file.Clusters`.
    """

    records: list[tuple[str, str | None]]
    labels: np.ndarray
    facts: dict[str, Any]


def image_features(
    model: ScoredModel,
    data: DataConfig,
    records: Records,
    folder: Path,
    shared: dict[str, Any],
    batch_size: int,
    device: torch.device,
) -> Features:
    """Features of all records. Every process must call it, and runs the model over its share.

    Args:
        model: whose vision tower and connector are used.
        data: settings of the records.
        records: the records.
        folder: of the journals of the command.
        shared: what the scores of all models depend on.
        batch_size: records per forward pass.
        device: where the model runs.

    Raises:
        DataError: a record is bad, or its features are not finite.
        StoppedError: the command was asked to stop.
    """
    processor = model.processor()
    encoder = Encoder(records, processor, data, answers=False)
    request = {**shared, **request_of(model, processor), "pass": FOLDER}
    journal = Scores(folder / FOLDER, model.name, request)
    run_pass(model, encoder, journal, batch_size, device, _rows, f"images of {model.name}")
    distributed.barrier()
    known: list[tuple[str, str | None]] = [("", None)] * len(records)
    points = {}
    for index, id, key, said in journal_rows(folder / FOLDER, model.name):
        known[index] = (id, key)
        if said is not None:
            points[index] = np.frombuffer(base64.b64decode(said), "<f4")
    return Features(known, points)


def _rows(block: Block, encoder: Encoder, model: LiveTeacher) -> list[Row]:
    """The rows of a block with their features; None without images, and for bad records."""
    batch = batch_of(block, encoder, model)
    if batch is None:
        return [[*row, None] for row in block.rows]
    found = pooled_images(model, batch.to(model.device))
    good = iter(zip(batch.ids, *found, strict=True) if block.batch is not None else [])
    rows = []
    for row in block.rows:
        said = None
        if row[2] is not None:
            name, point, shown = next(good)
            if shown and not bool(point.isfinite().all()):
                raise DataError(
                    "the features of its images are not finite",
                    where=f"record {name}",
                    hint="check the weights of the model, and its dtype",
                )
            content = point.cpu().numpy().astype("<f4").tobytes()
            said = base64.b64encode(content).decode() if shown else None
        rows.append([*row, said])
    return rows


@torch.no_grad()
def pooled_images(model: LiveTeacher, batch: Batch) -> tuple[Tensor, list[bool]]:
    """Mean image tokens of each record as they enter the decoder, [B, H] float32 of length 1, and
    whether it has images.

    Args:
        model: on its device.
        batch: of B records, on the same device.
    """
    inputs = inputs_as(batch, model.model.dtype)
    images = batch.targets.vision  # [B, T]
    entering = model.signals(replace(batch, inputs=inputs), FIRST_LAYER).embeddings
    assert entering is not None
    weights = images.double() / images.sum(1, keepdim=True).clamp(min=1)
    means = torch.einsum("bth,bt->bh", entering[: len(images)].double(), weights)
    return F.normalize(means, dim=-1).float(), images.any(1).tolist()


def cluster_records(features: Features, count: int, seed: int, model: str) -> Grouped:
    """Sort records into clusters by their images. Records without images are a further cluster, the
    last one.

    Args:
        features: of the records.
        count: number of clusters of records with images.
        seed: of the clusters.
        model: description of the model that made the features.

    Raises:
        DataError: there are fewer different images than clusters.
    """
    labels = np.full(len(features.records), np.nan)
    shown = sorted(features.points)
    keys = [features.records[index][1] or "" for index in shown]
    try:
        if not shown:
            raise TooFewPointsError("no record has an image")
        labels[shown] = clusters(np.stack([features.points[i] for i in shown]), keys, count, seed)
    except TooFewPointsError as error:
        raise DataError(
            f"the images cannot be sorted into {count:,} clusters: {error}",
            where="--clusters",
            hint="ask for fewer, or give records with other images",
        ) from error
    good = np.array([key is not None for _, key in features.records])
    labels[np.isnan(labels) & good] = count
    sizes = np.bincount(labels[good].astype(np.int64), minlength=count).tolist()
    without = count if len(sizes) > count else None
    facts = {"model": model, "seed": seed, "sizes": sizes, "without_images": without}
    return Grouped(features.records, labels, facts)


def print_clusters(found: dict[str, Any]) -> None:
    """Print the size of each cluster."""
    for number, size in enumerate(found["sizes"]):
        without = " without images" if number == found["without_images"] else ""
        say(f"cluster {number}: {size:,} records{without}")
