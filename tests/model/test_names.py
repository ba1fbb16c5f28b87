"""What the name of a model stands for: the same in `from_pretrained`, `from_backbone`, `open_model` and on the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_backbone

from longmem import LongMemForCausalLM
from longmem.model import names
from longmem.model.names import lasting_name, look_up
from longmem.model.opening import open_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with a backbone, a model saved on it, one that holds its own backbone, and one without a name."""
    folder = tmp_path_factory.mktemp("models")
    backbone = str(save_tiny_backbone(folder / "backbone"))
    model = LongMemForCausalLM.from_backbone(backbone, segment_length=16, num_retrieved_tokens=8)
    model.save_pretrained(folder / "saved")
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.add_(1)
    model.save_pretrained(folder / "whole", save_backbone=True)
    model.config.backbone_name_or_path = None
    model.save_pretrained(folder / "nameless")
    return folder


def embeddings(model: LongMemForCausalLM) -> torch.Tensor:
    return model.backbone.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("name", "origin", "backbone"),
    [("backbone", "new", "backbone"), ("saved", "saved", "backbone"), ("whole", "saved", "whole/backbone")],
)
def test_every_opener_takes_the_same_backbone(place, name, origin, backbone):
    named = look_up(place / name)
    assert (named.origin, named.backbone) == (origin, str(place / backbone))
    assert named.side_network == (place / name if origin == "saved" else None)
    expected = embeddings(LongMemForCausalLM.from_backbone(place / backbone, segment_length=16))
    for model in (open_model(str(place / name)), LongMemForCausalLM.from_backbone(str(place / name))):
        torch.testing.assert_close(embeddings(model), expected, rtol=0, atol=0)
        assert model.config.backbone_name_or_path == str(place / backbone)
    assert open_model(str(place / name)).config.segment_length == (16 if origin == "saved" else 1024)
    if origin == "saved":
        assert LongMemForCausalLM.from_pretrained(place / name).config.segment_length == 16
        assert LongMemForCausalLM.from_backbone(place / name, segment_length=32).config.segment_length == 32


def test_a_backbone_alone_is_no_saved_model(place):
    with pytest.raises(ValueError, match=r"backbone has no side network: .*`from_backbone` makes a new"):
        LongMemForCausalLM.from_pretrained(place / "backbone")


def test_a_backbone_without_a_name_is_asked_for(place):
    with pytest.raises(ValueError, match="does not name its own"):
        LongMemForCausalLM.from_backbone(place / "nameless")
    with pytest.raises(ValueError, match="pass `backbone=`"):
        open_model(str(place / "nameless"))


def test_a_saved_model_on_the_hub_is_a_saved_model(place, monkeypatch):
    """Its backbone inside the repository is found as well; of a backbone on the hub nothing but the configuration is read."""
    asked = []

    def download_file(name, file, revision):
        asked.append((name, file, revision))
        return str(place / name.partition("/")[2] / file)

    def download(name, revision, allow_patterns):
        asked.append((name, tuple(allow_patterns), revision))
        return str(place / name.partition("/")[2])

    monkeypatch.setattr(names, "hf_hub_download", download_file)
    monkeypatch.setattr(names, "snapshot_download", download)
    named = look_up("somebody/whole", "v2")
    assert (named.origin, named.backbone) == ("saved", str(place / "whole" / "backbone"))
    assert asked == [
        ("somebody/whole", "config.json", "v2"),
        ("somebody/whole", names.PATTERNS, "v2"),
    ]
    for model in (LongMemForCausalLM.from_pretrained("somebody/whole", revision="v2"), open_model("somebody/whole")):
        torch.testing.assert_close(embeddings(model), embeddings(open_model(str(place / "whole"))), rtol=0, atol=0)
    asked.clear()
    assert look_up("somebody/backbone") == names.NamedModel("somebody/backbone", "new", "somebody/backbone")
    assert asked == [("somebody/backbone", "config.json", None)]


@pytest.mark.parametrize("opener", [open_model, LongMemForCausalLM.from_backbone, LongMemForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", ["no-such-model", "runs/no/such/folder"])
def test_a_name_of_nothing_is_refused(opener, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=name):
        opener(name)


def test_a_damaged_configuration_is_said_to_be_damaged(place, tmp_path):
    folder = Path(shutil.copytree(place / "saved", tmp_path / "saved"))
    for text in ('{"model_type": "longm', "[1, 2]"):
        (folder / "config.json").write_text(text)
        for opener in (open_model, LongMemForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=r"config\.json can't be read"):
                opener(str(folder))


def test_a_name_that_lasts(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    assert lasting_name("saved") == str(place / "saved")
    assert lasting_name("whole/backbone", beside=place / "whole") == "backbone"
    assert lasting_name("whole/backbone", beside=tmp_path) == str(place / "whole" / "backbone")
    Path("smollm2-135m").mkdir(exist_ok=True)
    for name in ("smollm2-135m", "somebody/model"):
        assert lasting_name(name) == name
    assert lasting_name("./smollm2-135m") == str(place / "smollm2-135m")
    assert json.loads((place / "whole" / "config.json").read_text())["backbone_name_or_path"] == "backbone"
