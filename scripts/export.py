"""Export a trained model as a folder for the Hugging Face hub: see `export.py --help`."""
import argparse
import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import shutil
import sys
import textwrap
import types
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vit_helpers  # noqa: E402

DATASETS = vit_helpers.load_notebook("02_data")
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "safetensors")
FILES = ("README.md", "config.json", "model.onnx", "model.py", "model.safetensors")
TOLERANCE = 1e-3        # of logits; other kernels add in another order, which gives some 1e-6

EPILOG = """\
The folder holds
  model.onnx         images uint8 (B, C, S, S), 0 to 255 -> logits (B, classes); any batch size,
                     the normalisation inside
  model.safetensors  the weights, to be loaded into
  model.py           the models of notebook 1: needs PyTorch alone
  config.json        class and settings of the model, classes, preprocessing, training
  README.md          a model card; choose a licence before you publish it
It has its name only when all of it is written and checked: the ONNX model and model.py with the
saved weights must give the logits of the model itself. To publish: hf upload NAME FOLDER

Exit code: 0 done; 1 not done, for the reason given; 2 arguments; 130 interrupted.
"""
TRAINING = ("recipe", "optimizer", "schedule", "epochs", "batch_size", "learning_rate",
            "warmup_epochs", "weight_decay", "momentum", "grad_clip", "label_smoothing", "augment",
            "mix", "ema_decay", "class_weights", "initial_weights", "seed", "precision")


# ---------------------------------------------------------------- what is known of the run

class Run:
    """A trained model and what its run folder says: name, model, config, and results and
    predictions (None if the run is not finished, or if only a checkpoint is there)."""

    def __init__(self, run):
        needed = (*vit_helpers.IMAGE_SETTINGS, "dataset", "images")
        self.model = vit_helpers.load_model(run, needed=needed)
        path = vit_helpers.find_checkpoint(run)
        self.config = self.model.config
        self.name = path.parent.name if path.name == "best.pt" else path.stem
        self.results = self.predictions = None
        if str(run).endswith(".pt"):            # a checkpoint alone may be from another machine
            return
        with contextlib.suppress(FileNotFoundError):
            self.results = vit_helpers.read_json(vit_helpers.find_run(run) / "results.json")
        if self.results:
            self.predictions = vit_helpers.read_predictions(run)    # its error says what to do

    def dataset(self):
        """The data set as it is written in text; of a folder, its name alone."""
        name = vit_helpers.data_name(self.config)
        return DATASETS.TITLES.get(name, name)

    def slug(self):
        """The data set's name as the hub's header has it; "imagefolder" for a folder."""
        name = self.config["dataset"]
        return "imagefolder" if DATASETS.is_folder(name) or "folder" in self.config else name

    def images(self):
        """Real test images as the model takes them, uint8 (N, C, S, S), or random ones."""
        config = self.config
        if self.predictions is None:
            shape = (32, *self.model.image_shape)
            return torch.randint(0, 256, shape, generator=vit_helpers.generator("export")).byte()
        return torch.stack([vit_helpers.read_image(image, config["in_channels"],
                                                   config["image_size"])
                            for image in self.predictions["images"]])


class FromBytes(torch.nn.Module):
    """A model with its normalisation: uint8 images (B, C, S, S), 0 to 255 -> logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.mean, self.std = model.config["mean"], model.config["std"]

    def forward(self, images):
        return self.model(vit_helpers.normalise(images, self.mean, self.std))


# ---------------------------------------------------------------- the files

def config_of(run):
    """The content of config.json.  The preprocessing has timm's names (`create_transform` takes
    them); no path of this machine is in it."""
    config = run.config
    training = {name: config[name] for name in TRAINING if config.get(name) is not None}
    if "initial_weights" in training:
        training["initial_weights"] = Path(training["initial_weights"]).name
    return {
        "class": config["class"], "model_settings": config["model_settings"],
        "classes": config["classes"], "image_size": config["image_size"],
        "mean": config["mean"], "std": config["std"],
        "preprocessing": {
            "input_size": list(run.model.image_shape), "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": config["mean"], "std": config["std"]},
        "dataset": run.dataset(), "training": training, "code_hash": vit_helpers.code_hash()}


def weights_of(model):
    """The content of model.safetensors: the parameters in fp32, and that PyTorch wrote them."""
    import safetensors.torch
    values = {name: value.contiguous() for name, value in model.state_dict().items()}
    return safetensors.torch.save(values, metadata={"format": "pt"})


def onnx_of(model):
    """The content of model.onnx.  The classes are in its metadata as JSON."""
    import onnx_ir
    example = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            FromBytes(model).eval(), (example,), input_names=["images"], output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, dynamo=True,
            external_data=False, verbose=False)
    graph = program.model.graph
    for part in (graph, *graph.all_nodes(), *graph.inputs, *graph.outputs,
                 *graph.initializers.values()):
        part.metadata_props.clear()             # stack traces, with paths of this machine
    for node in graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
        node.doc_string = None
    program.model.metadata_props["classes"] = json.dumps(model.config["classes"])
    return onnx_ir.to_proto(program.model).SerializeToString()


def code():
    """The content of model.py: the exported cells of notebook 1, one after the other."""
    opening = ('"""The models of notebooks/01_models.ipynb, as they were when this was exported.  '
               'Needs PyTorch alone."""\n')
    cells = [source.removeprefix("#| export\n").strip("\n")
             for _, source in vit_helpers.exported_cells("01_models")]
    return opening + "\n\n\n".join(cells) + "\n"


# ---------------------------------------------------------------- the model card

SETUP = """\
import json
import numpy as np
from PIL import Image, ImageOps

config = json.load(open("config.json", encoding="utf-8"))
side = config["image_size"]
image = ImageOps.exif_transpose(Image.open("some.jpg"))
if image.mode.startswith("I"):          # 16 bits
    image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
image = image.convert("{mode}")
image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
images = {array}     # uint8 {shape}
"""
BY_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {"images": images})[0]           # (1, number of classes)
print(config["classes"][logits.argmax()])
"""
BY_TORCH = """\
import torch
from safetensors.torch import load_file
import model                            # model.py in this folder: needs PyTorch alone

network = getattr(model, config["class"])(**config["model_settings"])
network.load_state_dict(load_file("model.safetensors"))
network.eval()
mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
logits = network((torch.tensor(images) / 255 - mean) / std)
print(config["classes"][logits.argmax()])
"""


def card(run):
    """The content of README.md: a model card with the hub's header."""
    config, number = run.config, sum(value.numel() for value in run.model.parameters())
    what = (f"A Vision Transformer (`{config['class']}`, {number:,} parameters), trained from "
            f"{'other weights' if config.get('initial_weights') else 'scratch'}, that sorts images "
            f"of {config['image_size']} x {config['image_size']} pixels into "
            f"{len(config['classes'])} classes: {listed(config['classes'])}.")
    parts = [card_header(run), f"# {run.name}", wrapped(what), "## How to use it", usage(run),
             "## What it was trained on", training_data(run), "## How it was trained",
             training_table(run), "## Results", results(run), "## Intended use and limits",
             limits(run), "## Licence",
             "None is given yet. Choose one, and name it in the header of this file (`license:`)."]
    return "\n\n".join(parts) + "\n"


def card_header(run):
    """The YAML header of the card; texts as JSON writes them, which is YAML, too."""
    lines = ["---", "library_name: pytorch", "pipeline_tag: image-classification",
             "tags: [vision-transformer, image-classification, onnx, safetensors]",
             "# license: choose one, such as mit or apache-2.0"]
    if run.results:
        lines += ["model-index:", f"- name: {as_yaml(run.name)}", "  results:",
                  "  - task: {type: image-classification}",
                  f"    dataset: {{type: {as_yaml(run.slug())}, name: {as_yaml(run.dataset())}, "
                  "split: test}",
                  "    metrics:",
                  f"    - {{type: accuracy, value: {run.results['test_accuracy']:.4f}}}"]
    return "\n".join([*lines, "---"])


def as_yaml(text):
    """A text in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def wrapped(text):
    """A paragraph in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def listed(names, most=20):
    """The names with commas between them, the last ones counted where they are many."""
    more = f" and {len(names) - most} more, in config.json" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def in_cell(value):
    """A value as text for a cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def usage(run):
    """The code that runs the model, with ONNX and with PyTorch."""
    grey = run.config["in_channels"] == 1
    array = "np.array(image)[None, None]" if grey else "np.array(image).transpose(2, 0, 1)[None]"
    shape = ", ".join(map(str, run.model.image_shape))
    setup = SETUP.format(mode="L" if grey else "RGB", array=array, shape=f"(1, {shape})")
    takes = (f"In this folder, with Pillow and onnxruntime. `model.onnx` takes uint8 images "
             f"(batch, {shape}), 0 to 255, of any number and as they are: the normalisation is "
             "inside. It gives logits; their softmax is the probabilities.")
    other = ("Or, after the same first lines, with PyTorch and safetensors. These images are "
             "normalised by `mean` and `std` of config.json, on a scale of 0 to 1:")
    return "\n\n".join([wrapped(takes), fenced(setup + "\n" + BY_ONNX), wrapped(other),
                        fenced(BY_TORCH)])


def fenced(source):
    """Python code as Markdown shows it."""
    return f"```python\n{source.strip()}\n```"


def training_data(run):
    """What the model has seen, in a sentence or two."""
    config = run.config
    train, val, test = config["images"]
    text = (f"{run.dataset()}: {train:,} images to train on, {val:,} to validate (they choose the "
            f"best epoch), {test:,} to test. Each is brought to {config['image_size']} x "
            f"{config['image_size']} pixels, {'grey' if config['in_channels'] == 1 else 'RGB'}: "
            "the shorter side resized (bicubic), the centre kept.")
    if config.get("initial_weights"):
        text += f" It began with the weights {Path(config['initial_weights']).name}."
    return wrapped(text)


def training_table(run):
    """Settings, time and machine as a Markdown table."""
    config, rows = run.config, []
    for name in (name for name in TRAINING if config.get(name) is not None):
        value = Path(config[name]).name if name == "initial_weights" else config[name]
        rows.append((name, value))
    rows += [(name, value) for name, value in config["model_settings"].items()]
    if run.results:
        rows.append(("seconds", f"{run.results['seconds']:,.0f}"))
    machine = [config.get("device_name"), config.get("device")]
    rows.append(("machine", ", ".join(word for word in machine if word)))
    rows.append(("PyTorch", config.get("versions", {}).get("torch", "")))
    lines = [f"| {name} | {in_cell(value)} |" for name, value in rows]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def results(run):
    """Test accuracy with n and its standard error, and that of each class."""
    if run.results is None:
        return "The run is not finished, or its folder is not here: there are no test results."
    from scipy.stats import binomtest
    labels = run.predictions["labels"]
    hits = run.predictions["logits"].argmax(1) == labels
    right, images = int(hits.sum()), len(labels)
    low, high = binomtest(right, images).proportion_ci(method="wilson")
    rate = right / images
    error = 100 * math.sqrt(rate * (1 - rate) / images)
    text = (f"Test accuracy {100 * rate:.2f}% ± {error:.2f} ({right:,} of {images:,} images; ± "
            "is the standard error by the size of the test set, and the 95% interval is "
            f"{100 * low:.1f} to {100 * high:.1f}). n = 1: one seed, so nothing is known of the "
            f"spread between seeds. Test loss {run.results['test_loss']:.4f}. The model is that of "
            f"epoch {run.results['best_epoch']} of {run.results['epochs']}, which had the lowest "
            f"validation loss ({run.results['val_loss']:.4f}); it met the test set once.")
    rows = [f"| {in_cell(name)} | {100 * hits[labels == i].float().mean().item():.1f} "
            f"| {int((labels == i).sum()):,} |"
            for i, name in enumerate(run.config["classes"]) if (labels == i).any()]
    return "\n".join([wrapped(text), "", "| class | accuracy, % | test images |", "|---|--:|--:|",
                      *rows])


def limits(run):
    """What the model is for and what it is not for."""
    points = [
        f"For images like those it was trained on ({run.dataset()}), for learning and for trying "
        "ideas. On other images its accuracy is unknown; measure it on your own first.",
        f"It always answers with one of its {len(run.config['classes'])} classes, whatever the "
        "image shows. It cannot say that it does not know.",
        "Its probabilities are not calibrated"
        + (" (label smoothing lowers them)" if run.config.get("label_smoothing") else "") + ".",
        "It has whatever bias its training images have. Nobody has examined it for decisions about "
        "people or for anything where an error does harm."]
    return "\n".join(textwrap.fill(point, 100, initial_indent="* ", subsequent_indent="  ",
                                   break_on_hyphens=False) for point in points)


# ---------------------------------------------------------------- checked and written

def contents_of(run):
    """{file name: bytes} of the export."""
    config = json.dumps(config_of(run), indent=1, ensure_ascii=False) + "\n"
    return {"README.md": card(run).encode(), "config.json": config.encode(),
            "model.onnx": onnx_of(run.model), "model.py": code().encode(),
            "model.safetensors": weights_of(run.model)}


@torch.no_grad()
def check(run, contents):
    """A line on how far the exported logits are from the model's, over real test images where the
    run has some, in several batch sizes; RuntimeError if that is more than rounding."""
    import onnxruntime
    import safetensors.torch
    images = run.images()
    wanted = FromBytes(run.model)(images)
    session = onnxruntime.InferenceSession(contents["model.onnx"])
    module = types.ModuleType("exported")
    exec(compile(contents["model.py"], "model.py", "exec"), module.__dict__)
    config = json.loads(contents["config.json"])
    again = getattr(module, config["class"])(**config["model_settings"]).eval()
    again.load_state_dict(safetensors.torch.load(contents["model.safetensors"]))
    again.config = run.config
    by_torch = (FromBytes(again)(images) - wanted).abs().max().item()
    by_onnx = 0.0
    for size in (1, 7, len(images)):
        found = torch.from_numpy(session.run(None, {"images": images[:size].numpy()})[0])
        by_onnx = max(by_onnx, (found - wanted[:size]).abs().max().item())
    kind = "random images" if run.predictions is None else "test images"
    if not max(by_torch, by_onnx) < TOLERANCE:          # nor if it is not a number
        raise RuntimeError(f"the export gives other logits than the model (by {by_onnx:.2g} in "
                           f"ONNX, {by_torch:.2g} in PyTorch), so it was not written")
    return (f"largest difference of logits over {len(images)} {kind}, batches of 1, 7 and "
            f"{len(images)}: {by_onnx:.2g} in onnxruntime, {by_torch:.2g} in model.py")


def make_folder(folder):
    """Make a folder if it is missing; OSError with the way out if it cannot be made."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OSError(f"could not make {folder}: {error.strerror}; name another --output") \
            from error


def check_target(target, replace):
    """OSError if the export may not or should not be written at `target`."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent}; make it, or name another "
                                "--output")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target.parent} may not be written; name another --output")
    if not os.path.lexists(target):
        return
    there = set(os.listdir(target)) if target.is_dir() else None
    if there is None or there - set(FILES):
        raise FileExistsError(f"{target} is there already and is no earlier export, or holds more "
                              "than one; name another --output")
    if there and not replace:
        raise FileExistsError(f"{target} is there already; --replace (make: REPLACE=1) writes it "
                              "anew, its README.md too, or name another --output (OUTPUT=…)")


def write_folder(target, contents):
    """Write the files into a hidden folder beside `target`, then give it that name.  An earlier
    export gives way at the last moment."""
    temporary, old = (target.with_name(f".{target.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)            # of a try that was killed
    try:
        temporary.mkdir()
        for name, content in contents.items():
            vit_helpers.write_atomically(temporary / name, content)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        why = error.__cause__ or error
        raise OSError(f"could not write {target}: {why.strerror}; what was there before is whole") \
            from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def export(options):
    """Do what was typed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"an export needs {', '.join(missing)}; install what is missing "
                                  f"with: pip install {' '.join(PACKAGES)}  (`make export` does)")
    run = Run(options.run)
    target = vit_helpers.HOME / "exports" / run.name
    if options.output is not None:
        target = Path(os.path.realpath(options.output))  # a link stays a link
    else:
        make_folder(target.parent)
    check_target(target, options.replace)
    contents = contents_of(run)
    said = check(run, contents)
    write_folder(target, contents)
    for name in FILES:
        print(f"{len(contents[name]):>12,} bytes  {target / name}")
    print(said, flush=True)


# ---------------------------------------------------------------- from a shell

def in_words(error):
    """An error in one sentence, where Python itself would say [Errno 13] or [Errno 28]."""
    if isinstance(error, OSError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"could not write standard output: {error.strerror}"
    return vit_helpers.first_line(error)


def parse(arguments):
    """The options that were typed."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Export the best model of a run as a folder for the Hugging "
        "Face hub.", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="name of a run (`make runs` lists them), or its best.pt")
    add("--output", metavar="FOLDER", help="exports/<run>, if left out")
    add("--replace", action="store_true", help="write an earlier export anew")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Run the command; returns its exit code."""
    options = parse(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)            # the exporter's, on details that do not matter
    try:
        export(options)
        return 0
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"export: {in_words(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("export: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
