"""scripts/export.py: the exported folder by itself, and what happens where it cannot be written.

What needs onnx, onnxscript, onnxruntime and safetensors is skipped where they are not installed.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import vit_helpers
from jobs import small_config

SCRIPT = vit_helpers.ROOT / "scripts" / "export.py"
SPEC = importlib.util.spec_from_file_location("script_export", SCRIPT)
export = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(export)
RUN = "published/digits-seed0-vit"
MISSING = [name for name in export.PACKAGES if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def untrained(name, digits, **settings):
    """A checkpoint of a model as it is drawn, in a run of that name."""
    config = small_config(**settings)
    config.update(classes=digits.classes, mean=digits.mean, std=digits.std, images=[9, 9, 9])
    path = vit_helpers.SAVED_MODELS / name / "best.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": vit_helpers.build_model(config).state_dict(), "config": config}, path)
    return name


def in_a_fresh_process(folder, code):
    """What Python code prints in a folder, where nothing knows of this suite."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VIT")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def logits_of(model, images):
    """A model's logits for uint8 images, normalised as its run has it."""
    with torch.no_grad():
        return model(vit_helpers.normalise(images, model.config["mean"], model.config["std"]))


@needs_packages
def test_the_folder_gives_the_logits_of_the_model_without_the_suite(digits, tmp_path, capfd):
    """onnxruntime over the whole test set in batches of 1, 7 and 256; the code in the model card,
    as it stands there, by a process that has the folder alone."""
    import onnxruntime
    folder = tmp_path / "my export"
    assert export.main([RUN, "--output", str(folder)]) == 0
    assert sorted(os.listdir(folder)) == sorted(export.FILES)
    images, model = digits.test.images, vit_helpers.load_model(RUN)
    wanted = logits_of(model, images)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for size in (1, 7, 256):
        found = [session.run(None, {"images": part.numpy()})[0] for part in images.split(size)]
        difference = (torch.cat([torch.from_numpy(part) for part in found]) - wanted).abs().max()
        print(f"batch {size}: largest difference of logits {difference:.1e}")
        assert difference < 1e-4
    with pytest.raises(Exception, match="expected: .tensor.uint8"):
        session.run(None, {"images": images[:1].float().numpy()})
    said = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert said == model.config["classes"]

    wide = images[5, 0].numpy().astype("uint16") * 257          # 16 bits
    Image.fromarray(wide).save(folder / "some.jpg", format="PNG")
    card = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.S)
    check = "\nassert 'vit_helpers' not in sys.modules; print(*logits[0].tolist())"
    printed = in_a_fresh_process(folder, "import sys\n" + "\n".join(snippets) + check)
    name = model.config["classes"][wanted[5].argmax()]
    assert printed[:2] == [name, name]
    assert list(map(float, printed[2:])) == pytest.approx(wanted[5].tolist(), abs=1e-5)
    root = str(vit_helpers.ROOT).encode()
    assert not any(root in (folder / name).read_bytes() for name in export.FILES)


@pytest.mark.parametrize("mode, channels", [("RGBA", 1), ("RGBA", 3), ("LA", 1), ("I;16", 1)])
def test_the_cards_code_reads_an_image_as_the_suite_does(mode, channels, tmp_path, monkeypatch):
    """Transparent parts are white, and 16 bits are not cut off."""
    ramp = torch.arange(64).view(8, 8).mul(4).byte().numpy()
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype("uint16") * 257)
    else:
        image = image.convert(mode)
        image.putalpha(Image.fromarray(ramp.T.copy()))
    image.save(tmp_path / "some.jpg", format="PNG")
    (tmp_path / "config.json").write_text('{"image_size": 8}')
    monkeypatch.chdir(tmp_path)
    array = {1: "np.array(image)[None]", 3: "np.array(image).transpose(2, 0, 1)"}[channels]
    found = {}
    exec(export.SETUP.format(mode="L" if channels == 1 else "RGB", array=array, shape=""), found)
    wanted = vit_helpers.read_image(tmp_path / "some.jpg", channels, 8)
    assert torch.equal(torch.from_numpy(found["images"]), wanted)


@needs_packages
@pytest.mark.parametrize("name, settings", [
    ("merged", {"model": "vit", "merge_at": "2", "pool": "mean"}),
    ("hybrid", {"model": "towervit", "stem": "conv", "patch_size": 4})])
def test_merged_and_hybrid_models_in_any_batch_size(name, settings, digits):
    run = export.Run(untrained(name, digits, **settings))
    contents = export.contents_of(run)                          # nothing is written
    assert re.search(r"in onnxruntime, 0 in model.py$", export.check(run, contents))
    assert "there are no test results" in contents["README.md"].decode()
    contents["model.py"] = contents["model.py"].replace(b"eps=1e-6", b"eps=1e-2")
    with pytest.raises(RuntimeError, match="gives other logits than the model"):
        export.check(run, contents)


def test_the_models_stand_alone_and_are_kept_by_state_dict_and_settings(tmp_path, digits):
    """model.py needs PyTorch alone; settings and state_dict bring a model back elsewhere."""
    (tmp_path / "model.py").write_text(export.code())
    module = vit_helpers.load_notebook("01_models")
    settings = {"image_size": 8, "patch_size": 2, "in_channels": 1, "dims": (16, 32), "head_dim": 8}
    model = module.ViT(**settings).eval()
    torch.save({"settings": settings, "model": model.state_dict()}, tmp_path / "mine.pt")
    torch.save(digits.test.images[:4].float(), tmp_path / "images.pt")
    printed = in_a_fresh_process(tmp_path, """if True:
        import torch
        from model import ViT
        kept = torch.load("mine.pt", weights_only=True)
        vit = ViT(**kept["settings"]).eval()
        vit.load_state_dict(kept["model"])
        print(*vit(torch.load("images.pt")).flatten().tolist())""")
    with torch.no_grad():
        wanted = model(digits.test.images[:4].float()).flatten().tolist()
    assert list(map(float, printed)) == pytest.approx(wanted, abs=1e-5)


def test_the_model_card(monkeypatch):
    """A header that the hub reads, n and the test set's error, and no licence of our choice."""
    yaml = pytest.importorskip("yaml")
    run = export.Run(RUN)
    run.config["classes"] = ["a|b", 'say "no"', *run.config["classes"][2:]]
    card = export.card(run)
    _, header, text = card.split("---\n", 2)
    known = yaml.safe_load(header)
    assert known["pipeline_tag"] == "image-classification" and "license" not in known
    metric = known["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {"type": "accuracy", "value": round(run.results["test_accuracy"], 4)}
    assert "Test accuracy 96.94% ± 0.91 (348 of 359 images" in text and "n = 1" in text
    assert r"| a\|b | 100.0 | 36 |" in text
    for title in ("How to use it", "What it was trained on", "How it was trained", "Results",
                  "Intended use and limits", "Licence"):
        assert f"## {title}\n" in text
    assert max(map(len, card.splitlines())) <= 100


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """Whichever file cannot be written, the earlier export stays, or nothing is there."""
    earlier = {name: b"earlier" for name in export.FILES}
    write = vit_helpers.write_atomically

    def fails_at(name):
        def write_or_fail(path, content):
            if path.name == name:
                raise OSError("no room") from OSError(28, "No space left on device")
            write(path, content)
        monkeypatch.setattr(vit_helpers, "write_atomically", write_or_fail)

    for name in export.FILES:
        fails_at(name)
        for target, before in ((tmp_path / "new", None), (tmp_path / "old", earlier)):
            if before:
                target.mkdir(exist_ok=True)
                for file, content in before.items():
                    (target / file).write_bytes(content)
            with pytest.raises(OSError, match="could not write .*: No space left on device"):
                export.write_folder(target, {name: b"new" for name in export.FILES})
        assert os.listdir(tmp_path) == ["old"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == earlier
    fails_at(None)
    export.write_folder(tmp_path / "old", {name: b"new" for name in export.FILES})
    assert os.listdir(tmp_path) == ["old"]
    assert {path.read_bytes() for path in (tmp_path / "old").iterdir()} == {b"new"}


TARGETS = [     # an output, whether --replace is typed, what it ends with
    ("nowhere/x", False, "there is no folder .*nowhere"),
    ("export", False, "is there already; --replace .* writes it anew"),
    ("photos", True, "is no earlier export, or holds more"),
    ("a file", True, "is no earlier export"),
    ("closed/x", False, "closed may not be written; name another --output"),
]


@pytest.mark.parametrize("output, replace, said", TARGETS, ids=[row[0] for row in TARGETS])
def test_where_an_export_may_not_go(output, replace, said, tmp_path, monkeypatch):
    for folder, file in [("export", "model.py"), ("photos", "cat.jpg")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    (tmp_path / "a file").touch()
    (tmp_path / "closed").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode)
                        and path != tmp_path / "closed")        # root may write anywhere
    with pytest.raises(OSError, match=said):
        export.check_target(tmp_path / output, replace)
    export.check_target(tmp_path / "export", replace=True)


def test_what_is_missing_is_said_in_a_sentence(monkeypatch, capfd, digits):
    """Packages, and a run that there is not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main([RUN]) == 1
    assert capfd.readouterr().err == (
        "export: an export needs onnx, onnxscript, onnxruntime, safetensors; install what is "
        "missing with: pip install onnx onnxscript onnxruntime safetensors  (`make export` does)\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert export.main(["published/digits-seed0-vitt"]) == 1
    assert "near it: published/digits-seed0-vit" in capfd.readouterr().err
    shutil.rmtree(vit_helpers.SAVED_MODELS / "merged", ignore_errors=True)


ERRORS = [      # what happens, what is then said
    (PermissionError(13, "Permission denied", "best.pt"), "cannot read best.pt: Permission denied"),
    (OSError(28, "No space left on device"), "could not write standard output: No space left on"),
    (OSError("could not write x: No space left\nmore"), "could not write x: No space left$"),
]


@pytest.mark.parametrize("error, said", ERRORS, ids=[row[1][:20] for row in ERRORS])
def test_errors_of_the_system_are_said_in_a_sentence(error, said, monkeypatch, capfd):
    def fail(options):
        raise error

    monkeypatch.setattr(export, "export", fail)
    assert export.main([RUN]) == 1
    assert re.match(f"export: {said}", capfd.readouterr().err)


def test_a_home_that_may_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not make .*exports: Not a dir.*name another --output"):
        export.make_folder(tmp_path / "file" / "exports")
