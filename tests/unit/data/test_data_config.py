"""The `data` section: what it refuses, and that it survives a round trip through YAML."""

from pathlib import Path

import pytest

from treadle.config import keys, resolve, to_dict, to_yaml
from treadle.data.config import DataConfig
from treadle.errors import ConfigError

TEXT = {"kind": "text", "paths": "a.txt"}
SHARDS = {"kind": "shards", "path": "tokens"}


@pytest.mark.parametrize(
    ("raw", "key", "message"),
    [
        ({}, "sources", "neither is set"),
        ({"sources": [TEXT], "datasets": [SHARDS], "tokenizer": "bytes"}, "sources", "both are set"),
        ({"sources": [TEXT]}, "tokenizer", "`bytes`"),
        (
            {"sources": [TEXT, TEXT | {"weight": 2}], "tokenizer": "bytes"},
            "sources[0].weight",
            "give every one a weight",
        ),
        ({"datasets": [SHARDS | {"weight": 1}, SHARDS]}, "datasets[1].weight", "give every one a weight"),
        ({"sources": [TEXT | {"weight": 0}], "tokenizer": "bytes"}, "sources[0].weight", "0"),
        ({"sources": [TEXT], "tokenizer": "bytes", "held_out": 1}, "held_out", "1"),
        ({"sources": [{"kind": "txt"}], "tokenizer": "bytes"}, "sources[0]", "Did you mean 'text'"),
        ({"sources": [TEXT | {"seperator": "#"}], "tokenizer": "bytes"}, "seperator", "separator"),
        ({"sources": [TEXT], "tokenizer": {"kind": "train", "vocab_size": 9}}, "tokenizer", "257"),
    ],
)
def test_what_contradicts_itself_is_refused(raw: dict, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(DataConfig, raw)
    assert key in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"sources": [TEXT, {"kind": "jsonl", "paths": ["b.jsonl", "c.jsonl"], "field": "body"}], "tokenizer": "bytes"},
        {"sources": ["python_stdlib"], "tokenizer": {"kind": "train", "vocab_size": 999, "reserved": 3}, "workers": 2},
        {"datasets": [SHARDS | {"weight": 2}, {"kind": "megatron", "path": "m", "vocab_size": 9, "weight": 1.5}]},
        {
            "sources": [{"kind": "huggingface", "path": "a/b", "streaming": True}],
            "tokenizer": {"kind": "file", "path": "t"},
        },
    ],
)
def test_what_is_written_out_reads_back_the_same(raw: dict, tmp_path: Path) -> None:
    config = resolve(DataConfig, raw)
    assert resolve(DataConfig, to_dict(config)) == config
    (tmp_path / "data.yaml").write_text(to_yaml(config))
    assert resolve(DataConfig, tmp_path / "data.yaml") == config


def test_every_key_says_what_it_means() -> None:
    assert [key for key in keys(DataConfig) if not key[-1] and not key[0].endswith(")")] == []
