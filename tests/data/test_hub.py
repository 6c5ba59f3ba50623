import importlib.util
import json
import sys
from pathlib import Path

import pytest

from aquilamoe.config.corpus import HubConfig, SourceConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import CorpusStage
from aquilamoe.data import hub
from aquilamoe.data.cleaning import clean_corpus
from aquilamoe.data.corpus import SPLITS, read_documents, split_file

needs_datasets = pytest.mark.skipif(
    not importlib.util.find_spec("datasets"), reason="pip install -c constraints.txt -e '.[data]' (datasets)"
)


@needs_datasets
@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_data_set_gives_its_documents_streamed_and_fetched(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"Document {number}: 天下大势" for number in range(90)]
    (tmp_path / "data").mkdir()
    for number in range(3):
        lines = [json.dumps({"content": text, "lang": "zh"}) for text in texts[number * 30 : number * 30 + 30]]
        (tmp_path / "data" / f"{number}.jsonl").write_text("\n".join(lines))
    stage = CorpusStage.model_validate(
        {
            "kind": "corpus",
            "inputs": {},
            "validation_fraction": 0.2,
            "sources": {
                "zh": {
                    "hub": {"name": str(tmp_path / "data"), "streaming": streaming},
                    "text": "content",
                    "filters": {"columns": {"lang": "zh"}},
                }
            },
            "cleaning": {"shard_bytes": 1000},
        }
    )
    clean_corpus(stage, tmp_path / "out", tmp_path / "scratch", 1)
    kept = {
        split: [text for part in read_documents(split_file(tmp_path / "out", split, "zh")) for text in part]
        for split in SPLITS
    }
    assert kept["train"] == [text for text in texts if text in set(kept["train"])]
    assert sorted(kept["train"] + kept["validation"]) == sorted(texts)
    assert len(list(split_file(tmp_path / "out", "train", "zh").iterdir())) >= 3


@needs_datasets
def test_a_name_that_is_not_requested_from_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config
    import huggingface_hub.constants

    # What HF_HUB_OFFLINE=1 sets when these are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError) as caught:
        hub.ranges(HubConfig(name="no-one/nothing"), "sources.en.hub", 1)
    message = str(caught.value)
    assert message.startswith("sources.en.hub: 'no-one/nothing' cannot be opened (")
    assert message.endswith("; unset HF_HUB_OFFLINE to reach the hub")
    assert "\n" not in message


def test_without_the_library_the_message_names_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = SourceConfig.model_validate({"hub": {"name": "a/b"}})
    assert source.hub is not None
    with pytest.raises(UserError, match=r"needs the library datasets; pip install .*\[data\]"):
        hub.ranges(source.hub, "sources.en.hub", 1)
