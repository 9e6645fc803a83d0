"""What `s4g gallery calibrate` says at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from s4g_ray.cli.galleries.calibrate import describe_end


@pytest.mark.parametrize(("turns", "searches"), [(1, ""), (4, " (searches with --turns 4)")])
def test_the_end_tells_what_was_written_and_what_it_changes(turns: int, searches: str) -> None:
    report: Any = SimpleNamespace(warnings=("few queries",))
    warning, end = describe_end(report, "galleries/lake", turns)
    assert warning == "warning: few queries"
    assert end.startswith("wrote calibration.json into galleries/lake: answers of `s4g locate`")
    assert f"`s4g serve`{searches} now have probabilities and radii" in end
