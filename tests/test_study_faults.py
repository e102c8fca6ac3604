"""Broken training runs: each fault's sign, from logs made by hand and from runs of seconds."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from texts import tiny_study

from sae_lib.study import faults
from sae_lib.study.faults import FAULTS, HEALTHY, Broken
from sae_lib.study.profiles import SMOKE


def log(mse, l0=30.0, resampled=0):
    mse = np.asarray(mse, dtype=float)
    return pd.DataFrame({"dead": mse / 100, "mse": mse, "l0": l0, "resampled": resampled})


def test_signs_by_hand():
    found = faults.signs(log([100] * 10 + [10, 20] * 5, l0=[99] * 18 + [4, 6], resampled=[8] + [0] * 19), d_sae=16, held_out=30.0)
    assert found == pytest.approx({"silent": 0.15, "l0": 5, "jumps": np.log(2), "gap": 2, "resampled": 0.5})


def test_a_sign_shows_if_it_is_far_enough_from_the_healthy_one():
    base = dict.fromkeys(("silent", "l0", "jumps", "gap", "resampled"), 1.0)
    letters = dict(zip("ABCDEF", FAULTS, strict=True))
    shown = {letter: base | {FAULTS[name].sign: FAULTS[name].limit} for letter, name in letters.items()}
    hidden = {letter: base for letter in letters}
    for rows, expected in ((shown, True), (hidden, False)):
        table = faults.answers(Broken(pd.DataFrame(), pd.DataFrame({HEALTHY: base} | rows).T, letters))
        assert table.shows.tolist() == [expected] * 6


def test_the_runs_are_made_once_and_told_by_letters(tmp_path, monkeypatch):
    train = replace(SMOKE.frontier.fault_training, n_activations=1280, batch_size=64, resample_inputs=128, log_every=1)
    study = tiny_study(tmp_path, monkeypatch, n_ctx=16, frontier=replace(SMOKE.frontier, fault_training=train, contexts=16))
    found = faults.broken(study())
    again = faults.broken(study("load"))
    pd.testing.assert_frame_equal(again.logs, found.logs)
    assert set(found.letters.values()) == set(FAULTS)
    assert set(found.logs.run) == {HEALTHY, *"ABCDEF"}
    by_fault = {name: found.signs.loc[letter] for letter, name in found.letters.items()}
    healthy = found.signs.loc[HEALTHY]
    assert by_fault["high"].l0 < healthy.l0 < by_fault["low"].l0
    assert by_fault["rate"].silent > 10 * healthy.silent and by_fault["often"].l0 > 2 * healthy.l0


def test_unshuffled_rows_are_those_of_the_text_in_its_order(tmp_path, monkeypatch):
    run = tiny_study(tmp_path, monkeypatch, n_ctx=16)()
    stream = run.stream("A", 64)
    rows = faults._in_order(stream, 200)
    contexts = run.contexts("train")[:32].long()
    expected = faults.mlp_activations(stream.model, contexts)[contexts != 0][:200]
    torch.testing.assert_close(rows.float(), expected, atol=0.02, rtol=0.02)
