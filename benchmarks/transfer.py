"""What control costs: `python benchmarks/transfer.py [--preset 2b --size 704x1280 --frames 93]`.

One forward of the transformer alone, with one control branch and with four, of random weights none of which is zero, in
turns; beside diffusers' control network and transformer with the same weights. For each: time, arithmetic counted by
torch, its share of what this machine can do at most, memory beyond weights and inputs; and what the branch adds over
the base, beside what its arithmetic says. Then the plans: on which GPUs a transfer of this size runs. And, of the
distilled model, the time of its four steps. `--device meta` counts, traces and plans alone, at any size, without a GPU.
Writes results/transfer_MACHINE_PRESET.json and .md.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    RESULTS,
    busy_line,
    counted,
    device_name,
    dit_config,
    fill,
    height_width,
    installed,
    load_average,
    made_line,
    matmul_ceiling,
    paired,
    peak_memory,
    provenance,
    random_dit,
    ratio,
    shared_with_diffusers,
    slug,
    table,
    traced_peak,
    write_results,
)
from torch import Tensor, nn

from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import Conditions, DiT

PUBLISHED = {"blocks": 4, "every": 7, "channels": 128}
SMALL = {"blocks": 4, "every": 2, "channels": 128}
BASE, ONE, FOUR, THEIRS = "base", "base and 1 branch", "base and 4 branches", "diffusers, 1 branch"
DISTILLED_STEPS, OFFICIAL_DISTILLED = 4, 49.8  # seconds, their H200 NVL, 93 frames of 720p
PLAN_GIB = (16, 24, 48, 80)
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"preset": "small", "size": (192, 320), "frames": 17, "dtype": "float32", "repeats": 5},
    "cuda": {"preset": "2b", "size": (704, 1280), "frames": 93, "dtype": "bfloat16", "repeats": 3},
    "meta": {"preset": "2b", "size": (704, 1280), "frames": 93, "dtype": "bfloat16", "repeats": 0},
}
LEGEND = (
    "`TFLOP`: counted by torch, two operations a multiplication with addition, attention in full. `over base`: the "
    "same figure over that of the base alone (of times, the median over interleaved pairs). `of ceiling`: TFLOP/s of "
    "the best run over those of the best square matrix product in the same run and dtype. `memory`: beyond weights and "
    "inputs, in one pass without guidance."
)


def control_config(preset: str) -> ControlConfig:
    """The published branch, or one that fits the small transformer."""
    depth = dit_config(preset).depth
    return ControlConfig(**(PUBLISHED if depth > 21 else SMALL))


def random_branch(base: DiT, config: ControlConfig, device: str, dtype: torch.dtype, seed: int) -> ControlBranch:
    """A branch of random weights; its projections are drawn too."""
    with torch.device("meta"):
        branch = ControlBranch(base.config, config).to(dtype)
    if device == "meta":
        return branch.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, tensor: Tensor) -> None:
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5 / 2, generator=generator)

    fill(branch, draw, device)
    return branch


def their_branch(base: DiT, branch: ControlBranch) -> nn.Module:
    """diffusers' control network whose weights are ours."""
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos

    from orrery.weights.layouts import diffusers_control_keys
    from orrery.weights.pipeline_dir import control_json

    controlnet_cosmos.transforms = transformer_cosmos.transforms  # torchvision, or what stands in for it
    words = control_json(branch.config, base.config)
    with torch.device("meta"):
        theirs = controlnet_cosmos.CosmosControlNetModel(
            **{key: value for key, value in words.items() if not key.startswith("_")}
        )
    own, copies = diffusers_control_keys(branch.state_dict(), base.state_dict())
    weights = {key: branch.state_dict()[name] for name, key in own.items()}
    weights |= {key: base.state_dict()[name] for name, key in copies.items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The passes that are compared: every one a step of the solver, the text's keys and values at hand."""
    config, control = dit_config(options.preset), control_config(options.preset)
    config = dataclasses.replace(config, rope_bf16=False)  # diffusers knows no rounded exponents
    dtype, device = DTYPES[options.dtype], options.device
    if device == "meta":
        with torch.device("meta"):
            base = DiT(config).to(dtype).eval().requires_grad_(False)
    else:
        base = random_dit(config, device, dtype)
    branches = [random_branch(base, control, device, dtype, seed) for seed in range(1 if options.one else 4)]
    t, h, w = (options.frames - 1) // 4 + 1, options.size[0] // 8, options.size[1] // 8

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    latents, signal = drawn(1, config.latent_channels, t, h, w), drawn(1, 16, t, h, w)
    words, times = drawn(1, 512, config.text_width).to(dtype), torch.full((1, t), 700.0, device=device)
    mask = torch.zeros(1, 1, t, h, w, device=device)
    text = base.encode_text(words)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, count in ((BASE, 0), (ONE, 1), (FOUR, 4)):
        if count <= len(branches):
            controls = [ActiveControl(branch, signal, 1.0 / count) for branch in branches[:count]]
            told = Conditions(text, mask, controls=controls)
            found[name] = lambda told=told: base(latents, times, told)
    if options.diffusers:
        theirs, beside = shared_with_diffusers_for(base, control), their_branch(base, branches[0])
        scaled = (times * config.timestep_scale)[:, None, :, None, None]
        common = dict(condition_mask=mask, padding_mask=drawn(1, 1, *options.size) * 0, return_dict=False)

        def run() -> Tensor:
            given = dict(timestep=scaled, encoder_hidden_states=words, **common)
            hints = beside(controls_latents=signal, latents=latents, conditioning_scale=1.0, **given)[0]
            return theirs(hidden_states=latents, block_controlnet_hidden_states=hints, **given)[0]

        found[THEIRS] = run
    return found


def shared_with_diffusers_for(base: DiT, control: ControlConfig) -> nn.Module:
    """diffusers' transformer with our weights, told where the branch acts."""
    theirs = shared_with_diffusers(base)
    theirs.register_to_config(controlnet_block_every_n=control.every)
    return theirs


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Rows by contender, and the ceiling."""
    device, dtype = options.device, DTYPES[options.dtype]
    with torch.no_grad():
        runs = contenders(options)
        rows = {name: {"tflop": counted(run)[0]} for name, run in runs.items()}
        for name, run in runs.items():
            rows[name]["memory"] = traced_peak(run) if device == "meta" else peak_memory(run, device)
        found: dict[str, Any] = {"rows": rows}
        if device != "meta":
            if THEIRS in runs:
                ours = runs[ONE]().float()
                found["difference"] = float((runs[THEIRS]().float() - ours).abs().max() / ours.std())
            seconds = paired(runs, options.repeats, report=lambda line: print(line, file=sys.stderr))
            ceiling = found["ceiling"] = matmul_ceiling(device, dtype)
            for name in runs:
                best = min(seconds[name])
                rows[name] |= {
                    "seconds": statistics.median(seconds[name]),
                    "over_base": ratio(seconds, name, BASE),
                    "of_ceiling": rows[name]["tflop"] / best / ceiling,
                }
            if THEIRS in runs:
                found["speed"] = ratio(seconds, THEIRS, ONE)
            found["four_steps"] = DISTILLED_STEPS * rows[ONE]["seconds"]
            found["four_steps_limit"] = DISTILLED_STEPS * rows[ONE]["tflop"] / ceiling
    return found


def plans(options: argparse.Namespace) -> list[tuple[int, str]]:
    """Of a published model with 1 and with 4 branches, by size of the GPU."""
    from orrery.weights import find_model
    from orrery.world.plan import Shape, make_plan

    config = find_model("transfer2.5-2b").config
    lines = []
    for memory in PLAN_GIB:
        for count in (1, 4):
            branches = tuple(list(config.controls.values())[:count])
            shape = Shape(options.size, options.frames, options.frames, 2, branches)
            plan = make_plan(config, shape, memory * 2**30, torch.bfloat16, torch.bfloat16)
            lines.append((memory, f"{count} branch{'es' * (count > 1)}: {'' if plan.fits else 'does NOT fit; '}{plan}"))
    return lines


def markdown(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The result as a page."""
    height, width = options.size
    rows = []
    base = result["rows"][BASE]
    for name, row in result["rows"].items():
        cells = [name, f"{row['tflop']:.4g}", f"{row['tflop'] / base['tflop']:.3f}"]
        if "seconds" in row:
            cells += [f"{row['seconds']:.3g}", f"{row['over_base']:.3f}", f"{row['of_ceiling']:.0%}"]
        rows.append([*cells, "" if row["memory"] is None else f"{row['memory'] / 2**30:.3g}"])
    heads = ["", "TFLOP", "over base"]
    if options.device != "meta":
        heads += ["s", "over base", "of ceiling"]
    lines = [f"# What control costs: {options.preset}, {height}x{width}, {options.frames} frames", ""]
    lines += [made_line(result["made"]), "", busy_line(*result["load"]), "", LEGEND, ""]
    lines += table([*heads, "memory GiB"], rows)
    if "speed" in result:
        lines += [
            "",
            f"diffusers' pass with one branch takes {result['speed']:.2f} times ours; the outputs differ by at ",
        ]
        lines[-1] += f"most {result['difference']:.1e} of their standard deviation."
    if "four_steps" in result and options.preset == "2b":
        lines += ["", f"Four distilled steps with one branch: {result['four_steps']:.3g} s (at the ceiling "]
        lines[-1] += f"{result['four_steps_limit']:.3g} s; official, VAE and text included: {OFFICIAL_DISTILLED} s)."
    if result["plans"]:
        lines += ["", "Plans of transfer2.5-2b at this size, guidance included (`orrery plan`):", ""]
        lines += table(["GPU GiB", "plan"], [[str(memory), plan] for memory, plan in result["plans"]])
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="small, 2b, mini (default: what the device can run)")
    parser.add_argument("--size", type=height_width, metavar="HxW")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--one", action="store_true", help="one branch, not four")
    parser.add_argument("--no-diffusers", dest="diffusers", action="store_false")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name, value in DEFAULTS[torch.device(options.device).type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.diffusers = options.diffusers and options.device != "meta" and installed("diffusers")
    before = load_average()
    result = measured(options)
    result |= {"plans": plans(options) if options.preset == "2b" else []}
    result |= {"made": provenance("diffusers"), "load": [before, load_average()]}
    machine = "meta" if options.device == "meta" else slug(device_name(options.device))
    text = markdown(result, options)
    print(text)
    for path in write_results(f"transfer_{machine}_{options.preset}", result, text, options.results):
        print(f"wrote {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
