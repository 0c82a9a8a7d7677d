"""Peak memory and time of loading a transformer: `python benchmarks/loading.py`.

Writes random weights of a published shape as an official .pt, as a model folder of ours and as a diffusers directory,
and loads each in a process of its own: with `load_part`, and the way that needs no library (`torch.load`, then
`load_state_dict`), and with diffusers' `from_pretrained`. Afterwards every weight is read once (summed), so that mapped
pages count. The claim: the host never holds more than 1.1 times the file. Writes results/loading_MACHINE.json and .md.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    RESULTS,
    busy_line,
    device_name,
    dit_config,
    in_child,
    installed,
    load_average,
    made_line,
    provenance,
    random_dit,
    slug,
    status_kib,
    synchronise,
    table,
    write_results,
)
from torch import nn

from orrery.errors import InputError, OrreryError
from orrery.nn.dit import DiT
from orrery.weights import convert, find_model, load_part
from orrery.weights.official import official_table
from orrery.weights.pipeline_dir import transformer_json

LIMIT = 1.1
LEAST = 1e9  # bytes of a file that can be judged: some 15 MB of code and buffers are no weights
OFFICIAL, OURS, DIFFUSERS = "official .pt", "model folder", "diffusers directory"
PATHS = {OFFICIAL: "official.pt", OURS: "orrery", DIFFUSERS: "diffusers"}
WEIGHTS = {
    OFFICIAL: "official.pt",
    OURS: "orrery/transformer.safetensors",
    DIFFUSERS: "diffusers/transformer/diffusion_pytorch_model.safetensors",
}
KEPT = ("none", "bfloat16")
PLAIN, THEIRS = "torch.load, load_state_dict", "diffusers from_pretrained"
TEXT_DIM = 100352  # of the published text encoder, which a transformer in a file of its own takes
LEGEND = (
    "`file`: of the weights. `peak`: growth of the resident memory of a process at its highest (VmHWM less what was "
    "resident before), from before loading until every weight has been summed; mapped pages of the file count. `of "
    "file`: over the size of the file; `load_part` promises at most 1.1. `load`: until the network is there, median; "
    "`first`: the same with the file not in the page cache. `+ read`: until every weight has been summed, median. "
    "`CPU`: the least processor time of that, which others on the machine hardly change. The files are read from the "
    "page cache but for `first`; a mapped file is hardly read before its weights are."
)


def make_files(options: argparse.Namespace, folder: Path) -> None:
    """The three formats of one set of random weights."""
    config = dit_config(options.preset)
    if not config.text_projection:
        raise InputError(f"preset {options.preset} has no text projection: it fits no published text encoder")
    config = dataclasses.replace(config, text_dim=TEXT_DIM)
    with torch.device("meta"):
        needed = 3 * 2 * sum(weight.numel() for weight in DiT(config).parameters())
    if (free := shutil.disk_usage(folder).free) < 1.1 * needed:
        raise InputError(f"{folder} has {free / 1e9:.1f} GB free; {1.1 * needed / 1e9:.1f} are needed (see --folder)")
    path = folder / PATHS[OFFICIAL]
    print(f"random weights of {options.preset}", file=sys.stderr, flush=True)
    net = random_dit(config, "cpu", torch.bfloat16)
    torch.save(official_table(net.state_dict(), config, {}), path)
    del net
    files = find_model(path, like=like(options))
    for kind, to in ((OURS, "orrery"), (DIFFUSERS, "diffusers")):
        print(f"the same as a {kind}", file=sys.stderr, flush=True)
        convert(files, folder / PATHS[kind], to)


def like(options: argparse.Namespace) -> str:
    """The published model whose conventions a file is given."""
    return "predict2.5-14b" if "14b" in options.preset else "predict2.5-2b"


def load(case: str, options: argparse.Namespace) -> nn.Module:
    """The network of a case, "official .pt/bfloat16" and so on, on the device."""
    how, dtype = case.split("/")
    if how in PATHS:
        path = options.folder / PATHS[how]
        files = find_model(path, like=like(options)) if how == OFFICIAL else find_model(path)
        return load_part(files, "transformer", options.device, None if dtype == "none" else DTYPES[dtype])
    if how == PLAIN:
        config = find_model(options.folder / PATHS[OURS]).config.transformer
        with torch.device("meta"):
            net = DiT(config).to(torch.bfloat16)
        net.to_empty(device=options.device)
        weights = torch.load(options.folder / PATHS[OFFICIAL], map_location="cpu", weights_only=True)
        names = {f"net.{name}": name for name in net.state_dict()}
        net.load_state_dict({names[key]: value for key, value in weights.items() if key in names})
        return net
    from diffusers import CosmosTransformer3DModel

    folder = options.folder / PATHS[DIFFUSERS] / "transformer"
    return CosmosTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(options.device)


def measured(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of one load in this process."""
    torch.set_grad_enabled(False)
    if case.startswith(THEIRS):  # importing is not loading
        from diffusers import CosmosTransformer3DModel  # noqa: F401
        from diffusers.utils import logging

        logging.disable_progress_bar()
    cuda = torch.device(options.device).type == "cuda"
    torch.zeros(1, device=options.device)
    synchronise()
    reset = forget_peak()
    before = status_kib("VmRSS") if reset else status_kib("VmHWM")
    began, worked = time.perf_counter(), time.process_time()
    net = load(case, options)
    synchronise()
    loaded = time.perf_counter() - began
    total = sum(summed(weight) for weight in net.parameters())
    read = time.perf_counter() - began
    return {
        "cpu": time.process_time() - worked,
        "load": loaded,
        "read": read,
        "peak": (status_kib("VmHWM") - before) * 1024,
        "before": before * 1024,
        "gpu_peak": torch.cuda.max_memory_allocated(options.device) if cuda else None,
        "sum": total,
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in net.parameters()}),
    }


def summed(weight: torch.Tensor) -> float:
    """The sum of a weight, piece by piece: a wider copy of all of it would count as memory of loading."""
    return sum(piece.float().sum().item() for piece in weight.flatten().split(2**18))


def forget_peak() -> bool:
    """Let the system count this process's peak memory anew; False where it does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def leave_cache(path: Path) -> bool:
    """Ask the system to drop a file from its page cache; False where that cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every case, each in a process of its own: once with a cold file, then `repeats` times."""
    cases = [f"{kind}/{dtype}" for kind in PATHS for dtype in options.dtype] + [f"{PLAIN}/bfloat16"]
    if options.diffusers and installed("diffusers"):
        transformer_json(find_model(options.folder / PATHS[OURS]).config.transformer)  # refuses what it has no equal of
        cases.append(f"{THEIRS}/bfloat16")
    rows: dict[str, Any] = {}
    for case in cases:
        print(case, file=sys.stderr, flush=True)
        how = case.split("/")[0]
        file = options.folder / WEIGHTS[how if how in WEIGHTS else OFFICIAL if how == PLAIN else DIFFUSERS]
        words = ["--preset", options.preset, "--device", options.device, "--folder", str(options.folder)]
        cold = leave_cache(file)
        runs = [in_child([*words, "--load", case]) for _ in range(1 + options.repeats)]
        peak = max(run["peak"] for run in runs)
        rows[case] = {
            "file": file.stat().st_size,
            "peak": peak,
            "of_file": peak / file.stat().st_size,
            "first": runs[0]["load"] if cold else None,
            "load": statistics.median(run["load"] for run in runs[1:]),
            "read": statistics.median(run["read"] for run in runs[1:]),
            "cpu": min(run["cpu"] for run in runs),
            "runs": runs,
        }
    sums = {run["sum"] for row in rows.values() for run in row["runs"] if run["dtypes"] == ["bfloat16"]}
    widest = max(sums) - min(sums)
    if widest > 1e-6 * max(map(abs, sums)):  # the order of additions differs, the weights must not
        raise OrreryError(f"the sums of all weights differ between the ways of loading: {sorted(sums)}")
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as a page with a table."""
    about, rows = result["options"], []
    for case, row in result["rows"].items():
        how, dtype = case.split("/")
        gpu = row["runs"][0]["gpu_peak"]
        rows.append(
            [f"load_part, {how}" if how in PATHS else how, "of the file" if dtype == "none" else dtype]
            + [f"{row['file'] / 1e9:.2f}", f"{row['peak'] / 1e9:.2f}", f"{row['of_file']:.3f}"]
            + [
                f"{row['load']:.2f}",
                "" if row["first"] is None else f"{row['first']:.2f}",
                f"{row['read']:.2f}",
                f"{row['cpu']:.2f}",
            ]
            + ([] if gpu is None else [f"{gpu / 1e9:.2f}"])
        )
    heads = ["", "dtype", "file GB", "peak GB", "of file", "load s", "first s", "+ read s", "CPU s"]
    heads += ["GPU GB"] if any(row["runs"][0]["gpu_peak"] is not None for row in result["rows"].values()) else []
    lines = [
        f"# Loading a transformer on {result['device']}",
        "",
        made_line(result["made"]),
        "",
        busy_line(result["load_average"]["before"], result["load_average"]["after"]),
        "",
        f"{about['preset']} with text of width {TEXT_DIM}, random weights in bfloat16, {about['repeats']} runs and a "
        f"first one, each in a process of its own. {LEGEND}",
        "",
        *table(heads, rows),
        "",
        f"`load_part`, dtype kept: {verdict(result['rows'])[1]}.",
    ]
    return "\n".join(lines)


def verdict(rows: dict[str, Any]) -> tuple[bool, str]:
    """Whether `load_part` keeps its promise where it keeps the dtype of the file, and that in words."""
    chosen = [row for case, row in rows.items() if case.split("/")[0] in PATHS and case.split("/")[1] in KEPT]
    if not chosen:
        return True, "not measured"
    worst = max(row["of_file"] for row in chosen)
    said = f"at most {worst:.3f} times the file"
    if min(row["file"] for row in chosen) < LEAST:
        return True, f"{said}, but files this small are no test of {LIMIT}"
    return worst <= LIMIT, f"{said}; the promise of {LIMIT} is {'kept' if worst <= LIMIT else 'BROKEN'}"


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="2b", help="2b (3 files of 4.1 GB), 14b (3 of 28.7 GB), small: a look")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", nargs="+", choices=["none", *DTYPES], default=["none", "bfloat16"], help="to load in"
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs after the first (2)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="write the files here and keep them; reuse those there"
    )
    parser.add_argument("--no-diffusers", dest="diffusers", action="store_false")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the files, for --load
    parser.add_argument("--load", help=argparse.SUPPRESS)  # measure one case and stop
    options = parser.parse_args(words)
    if options.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {options.repeats}")
    dit_config(options.preset)
    return options


def main() -> int:
    """Runs the benchmark; 1 when the promise is broken, 2 on bad input."""
    options = arguments(sys.argv[1:])
    if options.load:
        print(json.dumps(measured(options.load, options)))
        return 0
    made, before = (
        provenance("safetensors", *["diffusers"] * (options.diffusers and installed("diffusers"))),
        load_average(),
    )
    with tempfile.TemporaryDirectory(prefix="orrery-loading-") as temporary:
        options.folder = options.keep or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        if not all((options.folder / path).exists() for path in WEIGHTS.values()):
            make_files(options, options.folder)
        rows = compare(options)
    result = {
        "made": made,
        "load_average": {"before": before, "after": load_average()},
        "device": device_name(options.device),
        "options": {key: getattr(options, key) for key in ("preset", "device", "dtype", "repeats", "diffusers")},
        "rows": rows,
    }
    name = f"loading_{slug(result['device'])}" + ("" if options.preset == "2b" else f"_{slug(options.preset)}")
    page = markdown(result)
    print(page, *write_results(name, result, page, options.results), sep="\n")
    return 0 if verdict(rows)[0] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
