"""Where work is sent, by the labels of the nodes that are alive."""

import pytest
import ray

from cxr_dist.placement import decoding, not_on_spot

GPU, CPU = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "preferred"),
    [
        ([], False),
        ([{"Alive": True, "Labels": {}}], False),
        ([{"Alive": True}], False),
        ([{"Alive": True, "Labels": {"cxr-role": "train"}}], False),
        ([{"Alive": False, "Labels": {"cxr-role": "ingest"}}], False),
        ([{"Alive": True, "Labels": {"cxr-role": "train"}}, {"Alive": True, "Labels": {"cxr-role": "ingest"}}], True),
    ],
)
def test_ingest_nodes_are_preferred_where_one_is_alive(
    monkeypatch: pytest.MonkeyPatch, nodes: list, preferred: bool
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    anywhere = [{"label_selector": {}}]
    wished = {"label_selector": {"cxr-role": "ingest"}, "fallback_strategy": anywhere}
    assert decoding() == (wished if preferred else {})


@pytest.mark.parametrize(
    ("there", "elsewhere"),
    [
        ({}, [0, 2]),
        ({"GPU": 1.0, "CPU": 64.0}, [2]),
        ({"GPU": 2.0}, []),
        ({"GPU": 5.0}, []),
    ],
)
def test_what_is_asked_for_elsewhere_than_on_spot(there: dict, elsewhere: list[int]) -> None:
    selectors = not_on_spot([GPU, CPU, GPU, CPU], there)
    assert selectors == [{"cxr-market": "!spot"} if place in elsewhere else {} for place in range(4)]
