"""Classify images with a trained model, from a shell: see `predict.py --help`."""
import argparse
import collections
import contextlib
import csv
import errno
import itertools
import os
import signal
import stat
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vit_helpers  # noqa: E402

DATASETS = vit_helpers.load_notebook("02_data")

EPILOG = """\
A folder is searched to its end, hidden files and folders left out. Where images lie in folders
named like the run's classes, the accuracy is said at the end, and a CSV has a column `label`.
Standard output is the table or CSV alone; all else goes to standard error. A name that begins
with - is written ./-name, or after --. To read the names from another command, one a line:
  find photos -name '*.jpg' | predict.py pets -

Exit code: 0 done; 1 nothing done, or an image that was named could not be read (the others are
done, and unreadable files inside folders are named and counted); 2 arguments; 130 interrupted.
"""
NAMED = 10              # so many unreadable files are named, the others counted
WIDEST = 60             # characters of the table's first column; longer paths stick out

Item = collections.namedtuple("Item", "path label named")   # label: a class or None; named: typed


# ---------------------------------------------------------------- which images

def find_images(names, classes):
    """([Item], messages, whether a name that was typed cannot be used) of files and folders."""
    items, messages, failed = [], [], False
    for name in names:
        try:
            mode = os.stat(name).st_mode
            if stat.S_ISDIR(mode):
                found, more = images_in(Path(name), classes)
                items += found
                messages += more
            elif stat.S_ISREG(mode):
                own = Path(os.path.abspath(name)).parent.name       # not where a link leads
                items.append(Item(name, label_of([own], classes), True))
            else:                                       # reading a pipe could wait for ever
                raise OSError(errno.EINVAL, "skipped, it is a pipe or a device")
        except OSError as error:
            messages.append(f"{name}: {error.strerror}")
            failed = True
    return items, messages, failed


def images_in(folder, classes):
    """([Item], messages) of the files below a folder, sorted, each once."""
    found = DATASETS.scan(folder)
    own = Path(os.path.abspath(folder)).name
    items = [Item(str(folder.joinpath(*names)), label_of([*names[:-1], own], classes), False)
             for names in found.files]
    messages = []
    for text, which in [("{n} hidden file{s} left out", found.hidden),
                        ("{n} link{s} to what is there already, used once", found.repeated),
                        ("{n} pipe{s} or device{s} skipped", found.special),
                        ("{n} folder{s} skipped that may not be opened", found.closed)]:
        messages += [f"{folder}: {line}" for line in DATASETS.note(text, which)]
    return items, messages


def label_of(folders, classes):
    """The first of the folders' names that is a class, or None."""
    names = (DATASETS.printable(name) for name in folders)
    return next((name for name in names if name in classes), None)


def typed_names(images):
    """The names that were typed; - stands for lines of standard input."""
    lines = []
    if "-" in images:
        lines = [line for line in os.fsdecode(sys.stdin.buffer.read()).splitlines() if line]
    return [name for image in images for name in (lines if image == "-" else [image])]


# ---------------------------------------------------------------- reading and classifying

def read(path, config):
    """uint8 (C, S, S), or a text that says why the file cannot be read."""
    try:
        return vit_helpers.read_image(path, config["in_channels"], config["image_size"])
    except ValueError as error:
        return str(error)


def read_batches(items, config, batch_size):
    """Yield ([Item], [image or text]) of so many items at a time, while threads read the next."""
    Image.init()                        # all formats now: threads that look at once would miss some
    pool, reading = ThreadPoolExecutor(torch.get_num_threads()), collections.deque()
    try:
        for start in range(0, len(items), batch_size):
            batch = items[start:start + batch_size]
            reading.append((batch, [pool.submit(read, item.path, config) for item in batch]))
            if len(reading) == 2:       # bounded memory: a batch in use and a batch to come
                batch, futures = reading.popleft()
                yield batch, [future.result() for future in futures]
        for batch, futures in reading:
            yield batch, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def classify(model, images, top):
    """[((class, probability), …) the most probable first] of uint8 images [(C, S, S)]."""
    config = model.config
    batch = torch.stack(images).to(next(model.parameters()).device)             # (B, C, S, S)
    logits = model(vit_helpers.normalise(batch, config["mean"], config["std"]))
    found = logits.float().softmax(1).topk(top)                                 # (B, top), twice
    names = [[config["classes"][index] for index in row] for row in found.indices.tolist()]
    return [tuple(zip(*row, strict=True)) for row in zip(names, found.values.tolist(), strict=True)]


def answers(model, items, top, batch_size):
    """Yield (Item, ((class, probability), …)) of each item, or (Item, text) where it cannot be
    read."""
    for batch, images in read_batches(items, model.config, batch_size):
        readable = [image for image in images if not isinstance(image, str)]
        rows = iter(classify(model, readable, top) if readable else ())
        for item, image in zip(batch, images, strict=True):
            yield item, image if isinstance(image, str) else next(rows)


# ---------------------------------------------------------------- the table

def header(top, labelled):
    """The names of the columns."""
    names = ["path", "class", "probability"]
    for place in range(2, top + 1):
        names.append("runner_up" if place == 2 else f"class_{place}")
        names.append("runner_up_probability" if place == 2 else f"probability_{place}")
    return names + ["label"] * labelled


def csv_writer(file):
    """A function that writes a row, probabilities with six digits."""
    writer = csv.writer(file, lineterminator="\n")
    return lambda row: writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell
                                        for cell in row])


def table_writer(file, items, classes):
    """A function that writes a row in columns.  Their widths are known before (the first row is
    the header), so that rows come out as they are made."""
    class_width, widths = max(map(len, classes)), []

    def write(row):
        if not widths:
            widths.append(min(WIDEST, max(len(item.path) for item in items)))
            widths.extend(len(name) if "probability" in name else max(len(name), class_width)
                          for name in row[1:])
        cells = [f"{cell:.4f}" if isinstance(cell, float) else DATASETS.printable(cell)
                 for cell in row]
        line = "  ".join(map(str.ljust, cells, widths)).rstrip()
        print(line, file=file, flush=sys.stdout.isatty())
    return write


@contextlib.contextmanager
def open_output(path):
    """A text file for the CSV that has its name only when it is whole; standard output for None
    and -; a device or a pipe as it is.  OSError says what could not be written."""
    try:
        if path in (None, "-"):
            sys.stdout.reconfigure(errors="surrogateescape")    # names of files are any bytes
            yield sys.stdout
            sys.stdout.flush()
            return
        final = Path(os.path.realpath(path))
        odd = final.exists() and not final.is_file()
        target = final if odd else final.with_name(f".{final.name}.{os.getpid()}.tmp")
        try:
            with open(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                yield file
            if not odd:
                os.replace(target, final)
        finally:
            if not odd:
                target.unlink(missing_ok=True)
    except OSError as error:
        name = "standard output" if path in (None, "-") else path
        if name != path:                            # Python would try once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"could not write {name}: {error.strerror or error}") from error


def check_output(path, items):
    """OSError or ValueError, before any work, for an output that cannot be or is an image."""
    if path in (None, "-"):
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--output {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"--output {path} is a folder; name a file in it")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise PermissionError(f"--output {path} may not be written here; name another place")
    final = os.path.realpath(path)
    there = [item.named for item in items if os.path.realpath(item.path) == final]
    if any(there) or there and DATASETS.open_file(final):       # not an earlier table in a folder
        raise ValueError(f"--output {path} is one of the images, and would be overwritten")


# ---------------------------------------------------------------- the whole

class Tally:
    """What came of the images: the Items that cannot be read; images and right ones by label."""

    def __init__(self):
        self.unreadable = []
        self.images, self.right = collections.Counter(), collections.Counter()

    def cannot_read(self, item, why):
        """Count an item, and name it if there are not many yet."""
        self.unreadable.append(item)
        if len(self.unreadable) <= NAMED:
            say(why)

    def classified(self, item, name):
        """Count an item that was classified as `name`."""
        self.images[item.label] += 1
        self.right[item.label] += item.label == name


def predict(options):
    """Do what was typed; returns the exit code."""
    started = time.perf_counter()
    device = vit_helpers.pick_device(options.device)
    model = vit_helpers.load_model(options.run, device, vit_helpers.IMAGE_SETTINGS)
    items, messages, failed = find_images(typed_names(options.images), model.config["classes"])
    for message in messages:
        say(message)
    if not items:
        raise ValueError(f"no images in {shortened(options.images)}")
    check_output(options.output, items)
    tally = write_all(model, items, options)
    seconds, unreadable = time.perf_counter() - started, tally.unreadable
    if unreadable:
        say(f"{len(unreadable):,} of {number_of(items, 'file')} cannot be read as images")
    say(f"{number_of(range(len(items) - len(unreadable)), 'image')} in {seconds:.1f} seconds")
    say_accuracy(tally, model.config["classes"])
    return int(failed or any(item.named for item in unreadable))


def write_all(model, items, options):
    """Write a row for each image and return the Tally; ValueError if none can be read."""
    classes, as_csv = model.config["classes"], options.output is not None
    top, labelled = min(options.top, len(classes)), any(item.label for item in items)
    on_screen = sys.stdout.isatty() and options.output in (None, "-")   # the rows show the progress
    bar = tqdm(answers(model, items, top, options.batch_size), total=len(items), unit="image",
               disable=on_screen or not vit_helpers.someone_watches())
    tally = Tally()
    with open_output(options.output) as file, bar:
        write = csv_writer(file) if as_csv else table_writer(file, items, classes)
        for item, answer in bar:
            if isinstance(answer, str):
                tally.cannot_read(item, answer)
                continue
            if not tally.images:
                write(header(top, labelled))
            write([item.path, *itertools.chain(*answer), *[item.label or ""] * labelled])
            tally.classified(item, answer[0][0])
        if not tally.images:
            raise ValueError(f"none of {number_of(items, 'file')} can be read as an image")
    return tally


def say_accuracy(tally, classes):
    """Top-1 and per-class accuracy of the images that lie in folders named like classes."""
    named = [name for name in classes if tally.images[name]]
    images, right = (sum(each[name] for name in named) for each in (tally.images, tally.right))
    if not images:
        return
    from scipy.stats import binomtest
    low, high = binomtest(right, images).proportion_ci(method="wilson")
    say(f"top-1 accuracy {100 * right / images:.2f}%, {right:,} of {images:,} "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f})")
    if tally.images[None]:
        say(f"  those in no folder named like a class left out: {tally.images[None]:,}")
    rates = {name: 100 * tally.right[name] / tally.images[name] for name in named}
    for name, rate in rates.items():
        say(f"  {name:{max(map(len, named))}s}  {rate:6.2f}% of {tally.images[name]:,}")
    say(f"  mean over {number_of(rates, 'class')} {sum(rates.values()) / len(rates):.2f}%")


def number_of(things, word):
    """How many there are, in words: "1 image", "1,000 images", "4 classes"."""
    several = f"{word}es" if word.endswith("s") else f"{word}s"
    return f"{len(things):,} {word if len(things) == 1 else several}"


def shortened(names):
    """The first of the names that were typed, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def say(text):
    """A message, on standard error, above a progress bar if there is one."""
    tqdm.write(f"predict: {DATASETS.printable(text)}", file=sys.stderr)


def at_least_1(text):
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def parse(arguments):
    """The options that were typed."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Classify images with the best model of a run.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="name of a run (`make runs` lists them), or its best.pt")
    add("images", metavar="IMAGES", nargs="+", help="files and folders; - reads names from stdin")
    add("--output", metavar="FILE", help="write CSV there instead of a table; - is standard output")
    add("--top", metavar="N", type=at_least_1, default=2, help="classes per image (2)")
    add("--batch-size", metavar="N", type=at_least_1, default=64, help="images at a time (64)")
    add("--device", help="cpu, cuda, cuda:1, mps; the best that works, if left out")
    return parser.parse_intermixed_args(arguments)


def main(arguments=None):
    """Run the command; returns its exit code."""
    options = parse(arguments)
    warnings.simplefilter("ignore")         # Pillow's, on images that it reads all the same
    try:
        return predict(options)
    except torch.OutOfMemoryError:
        say(f"out of memory on the device; try --batch-size {max(1, options.batch_size // 4)}")
    except (OSError, ValueError, RuntimeError) as error:
        closed = isinstance(error, OSError) and error.filename      # as Python itself says it
        say(f"cannot read {closed}: {error.strerror}" if closed else vit_helpers.first_line(error))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it as it ends `cat`
    sys.exit(main())
