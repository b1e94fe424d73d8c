"""The page of a run: every curve the right way up, and whole."""

import json
import math

import pytest
from matplotlib.figure import Figure

from llama2.train.metrics import read_log
from llama2.train.report import _curve, write_report


def logged(**quantities):
    """Lines of a log, as many as the quantities have values."""
    names, rows = quantities.keys(), zip(*quantities.values(), strict=True)
    return [{"kind": "step", "step": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows, 1)]


def limits(steps, name, evaluations=()):
    axes = Figure().add_subplot()
    _curve(steps, evaluations, name, name)(axes)
    return axes.get_ylim()


@pytest.mark.parametrize("first, last", [(-80.0, -60.0), (-60.0, -80.0), (-1.0, 3.0), (-5.0, -5.0)])
def test_what_may_be_negative_is_drawn_upright_and_whole(first, last):
    values = [first + (last - first) * i / 29 for i in range(30)]
    low, high = limits(logged(chosen_logprob=values), "chosen_logprob")
    assert low < min(values) and max(values) < high < max(values) + 0.2 * (max(values) - min(values)) + 1


def test_what_is_never_negative_begins_at_zero_but_for_the_loss():
    values = [10.0 + math.sin(i) for i in range(30)]
    assert -0.5 < limits(logged(reward=values), "reward")[0] <= 0
    assert limits(logged(loss=values), "loss")[0] > 8


def test_one_value_that_is_far_off_hides_nothing():
    values = [-1.0 - i / 400 for i in range(399)]
    for far in (-1e6, 1e6):
        low, high = limits(logged(margin=[*values, far]), "margin")
        assert -3 < low < -1.9 and -1 <= high < 0


def test_held_out_losses_are_part_of_the_loss_alone(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("llama2.train.report._curve", lambda steps, evaluations, name, label: (name, evaluations))
    monkeypatch.setattr("llama2.train.report.render_plot", lambda draw, kind: seen.update([draw]) or b"<svg")
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "margin")
    lines = [
        *logged(**{name: [1.0, 2.0] for name in names}),
        {"kind": "evaluation", "step": 2, "of": "held-out", "loss": 9},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path, title="t", facts={}, settings="", plots={"margin": "Margin"})
    assert {name: len(some) for name, some in seen.items()} == {**dict.fromkeys(names, 0), "loss": 1}


def test_a_quantity_that_no_step_has_is_an_empty_plot():
    assert limits(logged(loss=[1.0]), "margin") == (0.0, 1.0)


def test_a_text_may_hold_any_line_end(tmp_path):
    line = {"kind": "sample", "step": 1, "text": "one\u2028two\u0085three"}
    (tmp_path / "log.jsonl").write_text(json.dumps(line, ensure_ascii=False) + '\n{"kind": "st', encoding="utf-8")
    assert read_log(tmp_path / "log.jsonl") == [line]
