"""Fixtures of tests that train: plots take longer than such a run, and are drawn where the page is looked at."""

import pytest

from llama2.train import run


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Leave the plots out, unless the test asks for `report`."""
    if "report" not in request.fixturenames:
        monkeypatch.setattr(run, "write_report", lambda out, **rest: out / "report.html")


@pytest.fixture
def report():
    """Draw the report of this test's runs."""
