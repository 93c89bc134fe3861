"""What decides a record's numbers, as named facts: what tells rows apart and selects them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cmbench.records.options import dotted, pair_text, value_text
from cmbench.records.record import Record

#: Digits of a hash in a label.
_DIGITS = 8


def configuration_facts(record: Record) -> dict[str, Any]:
    """Return what is equal for all cells of one configuration, whatever their NFE and seeds.

    The options of the recipe by dotted key (``recipe.ema`` where sampling has a fact of that name),
    then what else decides the generator, and noise levels that the user chose.
    """
    training, sampling = record.training, record.sampling
    others = {
        "sampler": sampling.sampler,
        "ema": training.ema,
        "dtype": sampling.dtype,
        "labels": sampling.labels,
        "plugin": f"{record.plugin.distribution} {record.plugin.version}",
        "parameters": training.parameters,
        "images_seen": training.images_seen,
        "config": training.config_sha256[:_DIGITS],
    }
    chosen = (sampling.overrides or {}).get("sigmas")
    if chosen is not None:
        others["sigmas"] = chosen
    options = dict(dotted(training.config))
    return {(f"recipe.{k}" if k in others else k): v for k, v in options.items()} | others


def value_facts(record: Record) -> dict[str, Any]:
    """Return what else decides the numbers of a row, apart from NFE and seeds."""
    dataset, sampling = record.dataset, record.sampling
    keys = " ".join(metric.key for metric in record.metrics.values())
    return {
        "sigmas": sampling.sigmas,
        "samples": sampling.num_samples,
        "quantize": sampling.quantize,
        "dataset": f"{dataset.revision} {dataset.sha256[:_DIGITS]}",
        "reference": dataset.reference_sha256[:_DIGITS],
        "extractor": f"{dataset.extractor} {dataset.extractor_sha256[:_DIGITS]}",
        "held_out": held_out_sha256(record)[:_DIGITS] or "none",
        "metrics": list(record.metrics),
        "keys": hashlib.sha256(keys.encode()).hexdigest()[:_DIGITS],
    }


def held_out_sha256(record: Record) -> str:
    """Return the hash of the held-out images that the samples were compared with, if any were."""
    for metric in record.metrics.values():
        found = metric.detail.get("memorisation")
        if isinstance(found, Mapping):
            return str(found.get("held_out_sha256", ""))
    return ""


def telling_apart(facts: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return for each mapping the fewest facts, in order, that tell it from those that differ.

    Equal mappings get equal facts: none if all are equal. Facts that say as much as those before
    them are left out.
    """
    texts = [{name: value_text(value) for name, value in item.items()} for item in facts]
    names = list(dict.fromkeys(name for item in texts for name in item))
    chosen: list[str] = []
    kinds = len({json.dumps(item, sort_keys=True) for item in facts})

    def kinds_by(some: Sequence[str]) -> int:
        return len({tuple(item.get(name) for name in some) for item in texts})

    while kinds_by(chosen) < kinds:
        best = max(names, key=lambda name: kinds_by([*chosen, name]))
        if kinds_by([*chosen, best]) == kinds_by(chosen):
            break  # they differ in what no label shows
        chosen.append(best)
    return [pair_text((name, item.get(name)) for name in chosen) for item in facts]
