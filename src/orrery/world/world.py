"""World: from a prompt and a start to a Video.

Text2World, Image2World and Video2World are one call (arXiv 2511.00062): 0, 1 or 2 latent frames are given, the others
are drawn. A video longer than the model's native length is drawn in chunks that are chained in latent space: the last
latent frames of a chunk are the given frames of the next, and everything is decoded once, at the end, as a stream.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orrery.errors import InputError, note
from orrery.flow import (
    FrameCondition,
    Schedule,
    StepCache,
    distilled_schedule,
    guidance_jumps,
    guided_velocity,
    karras_schedule,
    numpy_noise,
    one_by_one,
    shift_schedule,
    side_by_side,
    solve,
    watched,
)
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.nn.preview import Preview
from orrery.nn.vae_tiling import decode_tiled, encode_tiled
from orrery.video import Video
from orrery.weights import Lora, Sampling, load_preview, model_hash, read_lora
from orrery.weights.sources import transformer_shapes
from orrery.world.networks import Embeddings, Networks
from orrery.world.plan import SMALL, Plan, Shape, device_bytes, encoded_at_once, latents_at_once, make_plan
from orrery.world.request import GIVEN_LATENTS, Factors, Request, Start, settle
from orrery.world.rollout import run_rollout
from orrery.world.speed import Spent, attention_kernel
from orrery.world.transfer import Edit, Transferred, run_transfer
from orrery.world.transfer_request import Signal, TransferRequest, settle_transfer

Progress = Callable[[int, int], None]
Show = Callable[[int, int, Video], None]
Watch = Callable[[int, int, Tensor], None]  # step, from 0; steps in all; latents [1, C, T, H, W] that it leads to


class World:
    """A world model, ready to generate.

    >>> world = load("mini")
    >>> fall = world.generate("a red ball falls and bounces", seed=1)
    >>> on = world.generate("a red ball falls and bounces", start=fall, frames=33)
    """

    def __init__(
        self,
        networks: Networks,
        name: str,
        placement: str | None = None,
        embeddings: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model, self.name, self.placement = networks, name, placement
        self.files, self.config = networks.files, networks.config
        self.device, self.dtype, self.speed = networks.device, networks.dtype, networks.speed
        self.embeddings = None if embeddings is None else Embeddings(embeddings, networks)
        self.factors = Factors.of(self.config)
        self._prepared: dict[str, Tensor] = {}
        self._told = ""
        self.spent = Spent()
        self._preview: Preview | None = None

    def __repr__(self) -> str:
        height, width = self.config.resolution
        length = f"{self.config.frames} frames, {self.config.fps:g} fps"
        return f"World({self.name!r}, {height}x{width}, {length}, {self.device})"

    @property
    def hash(self) -> str:
        """Which weights these are: 16 hex digits over the files of the model."""
        return model_hash(self.files)

    @property
    def loras(self) -> tuple[Lora, ...]:
        """What is merged into the transformer."""
        return self.model.loras

    @property
    def size_step(self) -> tuple[int, int]:
        """Height and width of a video must be multiples of these."""
        return self.factors.size_step

    def add_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> Lora:
        """Merge a LoRA file (PEFT, diffusers or official layout) into the transformer, on top of those that are.

        Raises:
            InputError: a key of the file that fits no weight of this model; a file that is no LoRA.
        """
        lora = read_lora(path, transformer_shapes(self.config.transformer), scale)
        self.model.with_loras([*self.loras, lora])
        return lora

    def remove_loras(self) -> None:
        """Take all LoRAs out again: the weights are bit for bit what they were."""
        self.model.with_loras([])

    def plan(
        self,
        size: tuple[int, int],
        frames: int,
        given: int = 5,
        guidance: bool = True,
        controls: Sequence[str] = (),
    ) -> Plan:
        """How a generation fits into this device's memory, with these kinds of control acting on it. A small model is
        resident without further ado."""
        width = self.config.transformer.width * self.config.transformer.depth
        if self.placement is None and width * self.config.transformer.width * 48 < SMALL:
            return Plan("resident", False, False, guidance, math.inf, {"all": 0})
        drawn = frames if self.config.any_length and frames < self.config.frames else self.config.frames
        branches = tuple(self.config.controls[kind] for kind in controls)
        shape = Shape(size, drawn, given, 2 if guidance else 1, branches, self.speed.quantise)
        memory, cuda = device_bytes(self.device), self.device.type == "cuda"
        return make_plan(self.config, shape, memory, self.dtype, self.model.vae_dtype, cuda, self.placement)

    def generate(
        self,
        prompt: str,
        start: Start | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        solver: str | None = None,
        schedule: str | None = None,
        shift: float | None = None,
        overlap: int = GIVEN_LATENTS,
        handover: str = "latents",
        progress: Progress | None = None,
        show: Show | None = None,
    ) -> Video:
        """Simulate what happens.

        Args:
            prompt: what there is and what it does.
            start: how it begins: a Video, a path to one or to an image, uint8 pixels [H, W, 3] or [T, H, W, 3], or a
                Pillow image. An image is continued; of a video of at least 5 frames the last 5 are. It is cropped in
                the middle and resized to the model's resolution, and the result begins with it.
            seed: 0 to 2**32 - 1; the same seed gives the same video on one machine.
            steps, guidance, negative_prompt, solver ("unipc", "euler"), schedule ("shift", "karras"), shift: default:
                what the model asks for.
            frames: 4k + 1; default the model's native length; 1 draws a picture. More is drawn in chained chunks.
            size: (H, W); default the model's resolution.
            overlap, handover: of a long video, how many latents (1 or 2) a chunk hands to the next, and whether they
                stay latents or are decoded and encoded again ("frames", as the official code does).
            progress: called as progress(steps done, steps in all).
            show: called as show(steps done, steps in all, Video) with a rough look at where each step leads to, by the
                model's preview decoder, or by the one of `use_preview`.

        Returns:
            The video, at the model's frame rate.

        Raises:
            InputError: an empty prompt, a start that cannot be used, a number out of range.
        """
        request = self.request(
            prompt,
            start,
            seed=seed,
            steps=steps,
            guidance=guidance,
            frames=frames,
            negative_prompt=negative_prompt,
            size=size,
            solver=solver,
            schedule=schedule,
            shift=shift,
            overlap=overlap,
            handover=handover,
        )
        return self.run(request, progress, show)

    def request(
        self,
        prompt: str,
        start: Start | None = None,
        *,
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        overlap: int = GIVEN_LATENTS,
        handover: str = "latents",
        **sampling: Any,
    ) -> Request:
        """Check and settle the arguments of `generate`, without generating. Warns about words the model cannot read,
        and about what it was not trained for."""
        if sampling.get("steps") is None:
            sampling["steps"] = self.speed.steps_of(self.config)
        return settle(
            self.config,
            self.model.reader,
            self.name,
            prompt,
            start,
            seed=seed,
            frames=frames,
            size=size,
            overlap=overlap,
            handover=handover,
            **sampling,
        )

    def run(self, request: Request, progress: Progress | None = None, show: Show | None = None) -> Video:
        """Generate what `request` settled; show: see `generate`."""
        plan = self._plan_of(request)
        self._tell(plan)
        self.spent = Spent()
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            if request.handover == "frames":
                return self._chained_frames(request, plan, progress, show)
            return self._decode(self._latents(request, plan, progress, show), plan)

    def use_preview(self, path: str | os.PathLike[str] | None = None) -> Preview:
        """Read the decoder of previews: a file (ours, or TAEW2.1 of TAEHV for the Wan 2.1 VAE), or the model's own.

        Raises:
            InputError: a file that is none, or made for another VAE; a model without one.
        """
        network = load_preview(self.files, path, self.device, self.model.vae_dtype)
        if network is None:
            raise InputError(
                f"{self.name} has no preview decoder; for the VAE of Wan 2.1 there is taew2_1.pth of madebyollin/taehv"
            )
        self._preview = network
        return network

    def _shown(self, show: Show | None, index: int, chunks: int) -> Watch | None:
        """`show` for the latents of one chunk, through the preview decoder."""
        if show is None:
            return None
        network = self._preview or self.use_preview()

        def watch(step: int, steps: int, x0: Tensor) -> None:
            pieces = network.decode_stream(x0.to(self.model.vae_dtype))
            frames = np.concatenate([Video.from_tensor(piece, self.config.fps).frames for piece in pieces])
            show(index * steps + step + 1, chunks * steps, Video(frames, self.config.fps))

        return watch

    def transfer(
        self,
        prompt: str,
        video: Start | None = None,
        controls: Mapping[str, Signal | Any] | Sequence[str] = ("edge",),
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Transferred:
        """Draw a video anew: control signals hold its structure, the prompt says how it looks.

        >>> world.transfer("a red ball falls, realistic look", "sim.mp4", ["edge"]).video.save("real.mp4")

        Args:
            prompt: what there is, what it does and how it looks.
            video: the input: a Video, a path, pixels. Its length, frame rate and size are the result's. None: those of
                the first control video.
            controls: kinds ("edge", "blur", "depth", "seg") that are made of the input, or kind -> `Signal`, or
                kind -> control video. Any subset, in any order. Where their weights sum to more than 1, they are
                divided by the sum, once (at every place, where there are masks).
            progress: called as progress(steps done, steps in all).
            options: seed, steps, guidance, negative_prompt, solver, schedule, shift, overlap, handover as in
                `generate`. frames: only the first so many. fps: only so many of a second. size: (H, W) that is drawn;
                default the trained one nearest to the input's aspect ratio. keep_size: give the input's size back
                (default). chunk: frames drawn at once. image: a reference for the look, for branches that take one.
                hold, hold_until, hold_labels: where the input itself is held until that step (guided generation).
                sigma_max: begin with the input at this ratio of noise to signal, not with pure noise (SDEdit).

        Raises:
            InputError: no control, a kind that the model has no branch for, a control video that does not fit the
                input, a weight outside 0 to 1, weights that are all 0, a mask of another shape, a missing model.
        """
        return self.run_transfer(self.transfer_request(prompt, video, controls, **options), progress)

    def transfer_request(
        self,
        prompt: str,
        video: Start | None = None,
        controls: Mapping[str, Signal | Any] | Sequence[str] = ("edge",),
        **options: Any,
    ) -> TransferRequest:
        """Check and settle the arguments of `transfer`, and make its control videos, without drawing."""
        asked = controls if isinstance(controls, Mapping) else {kind: Signal() for kind in controls}
        return settle_transfer(self, prompt, video, asked, **options)

    def run_transfer(self, request: TransferRequest, progress: Progress | None = None) -> Transferred:
        """Draw what `transfer_request` settled."""
        return run_transfer(self, request, progress)

    def rollout(self, start: Start, actions: Any, **options: Any) -> Video:
        """What happens when a robot acts: the start's last frame and N more, at the model's frame rate. For one that
        decides as it sees, and for many, see `orrery.world.Rollout`, which also says what is refused.

        >>> load("tabletop").rollout("table.png", np.zeros((48, 2))).save("what_happens.mp4")

        Args:
            start: an image, or a video whose last frames are the past.
            actions: [N, A], row t acts between frames t and t + 1, in the units of the model's data.
            options: seed, prompt, steps, progress as in `generate`; no prompt is what the model was trained with where
                there was none.
        """
        return run_rollout(self, start, actions, **options)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Encode the prompts of several requests in one visit of the text encoder, where it would otherwise be loaded
        anew for each; they are kept on the host until the next call (98 MiB a prompt for the published models)."""
        self._prepared = {}
        prompts = [r.prompt for r in requests] + [r.negative_prompt for r in requests if r.guidance > 0]
        wanted = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        if not wanted or (plan := self._plan_of(requests[0])).placement == "resident":
            return
        with torch.no_grad():
            self._prepared = {prompt: value.cpu() for prompt, value in self._encode_prompts(wanted, plan).items()}

    def _plan_of(self, request: Request) -> Plan:
        given = 0 if request.given is None else len(request.given)
        return self.plan(request.size, request.frames, given, request.guidance > 0)

    def _tell(self, plan: Plan) -> None:
        """One line about where things go, when there was something to choose; and again only when it changes."""
        if plan.capacity != math.inf and str(plan) != self._told:
            self._told = str(plan)
            note(f"memory: {plan}" + ("" if plan.fits else "; this is more than there is, and may fail"))

    def _schedule(self, sampling: Sampling) -> Schedule:
        if sampling.schedule == "karras":
            return karras_schedule(sampling.steps, exact_times=sampling.exact_times)
        kind = distilled_schedule if sampling.schedule == "distilled" else shift_schedule
        return kind(sampling.steps, sampling.shift, exact_times=sampling.exact_times)

    def _latents(self, request: Request, plan: Plan, progress: Progress | None, show: Show | None = None) -> Tensor:
        """Normalised latents [1, C, T, H, W] of the whole video, chunk after chunk."""
        total, native, overlap, chunks = self._layout(request)
        embeddings = self._embed(request, plan)
        known = self._known(request, plan)
        latents = known[:, :, :0]
        with self.model.use("transformer", plan.placement, resident=plan.resident) as transformer:
            texts = [transformer.encode_text(text.to(self.device)) for text in embeddings]
            for index in range(chunks):
                report = self._offset(progress, index, chunks)
                watch = self._shown(show, index, chunks)
                chunk = self._chunk(transformer, request, plan, index, native, known, texts, report, show=watch)
                latents = torch.cat([latents, chunk[:, :, overlap:] if index else chunk], dim=2)
                known = chunk[:, :, -overlap:] if overlap else known
        return latents[:, :, :total]

    def _chained_frames(
        self, request: Request, plan: Plan, progress: Progress | None, show: Show | None = None
    ) -> Video:
        """A long video chained as the official code does it: each chunk is decoded, rounded to uint8, and its last
        frames are encoded again as the given frames of the next (specification, section 4.7)."""
        _, native, overlap, chunks = self._layout(request)
        again = (overlap - 1) * self.factors.temporal + 1
        embeddings = self._embed(request, plan)
        known, pieces = self._known(request, plan), []
        for index in range(chunks):
            with self.model.use("transformer", plan.placement, resident=plan.resident) as transformer:
                texts = [transformer.encode_text(text.to(self.device)) for text in embeddings]
                report = self._offset(progress, index, chunks)
                watch = self._shown(show, index, chunks)
                chunk = self._chunk(transformer, request, plan, index, native, known, texts, report, show=watch)
            del texts
            video = self._decode(chunk, plan)
            pieces.append(video.frames[again if index else 0 :])
            known = self._encode(video[-again:], plan)
        return Video(np.concatenate(pieces)[: request.frames], self.config.fps)

    def _layout(self, request: Request) -> tuple[int, int, int, int]:
        """In latent frames: of the video, of a chunk, what a chunk repeats of the one before; and how many chunks."""
        total = self._latent_frames(request.frames)
        native = self._drawn(total)
        overlap = min(request.overlap, native - 1)
        return total, native, overlap, 1 + max(0, math.ceil((total - native) / (native - overlap)))

    def _latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.factors.temporal + 1

    def _drawn(self, total: int) -> int:
        """How many latent frames are drawn at once for a video of `total`."""
        native = self._latent_frames(self.config.frames)
        return min(native, total) if self.config.any_length else native

    def _known(self, request: Request, plan: Plan) -> Tensor:
        """Latents of the given frames [1, C, 0 to 2, H, W], float32."""
        if request.given is not None:
            return self._encode(request.given, plan)
        height, width = (side // self.factors.spatial for side in request.size)
        return torch.zeros(1, self.config.vae.latent_channels, 0, height, width, device=self.device)

    def _encode(self, video: Video, plan: Plan) -> Tensor:
        """Normalised latents [1, C, T, H, W] of a video, float32; a long one goes through as a stream."""
        with self.model.use("vae", plan.placement) as vae:
            parts = encoded_at_once(vae, len(video), video.height, video.width)
            if plan.tiled or len(parts) == 1:
                frames = video.to_tensor().to(self.device, self.model.vae_dtype)
                latents = encode_tiled(vae, frames) if plan.tiled else vae.encode(frames)
            else:
                pieces = (video[part].to_tensor().to(self.device, self.model.vae_dtype) for part in parts)
                latents = torch.cat([each.to(torch.float32) for each in vae.encode_stream(pieces)], dim=2)
            return latents.to(self.device, torch.float32)

    def _embed(self, request: Request, plan: Plan) -> list[Tensor]:
        """Embeddings [1, L, text_dim] of the prompt and, if there is guidance, of what it leads away from."""
        prompts: list[str | None] = [request.prompt]
        if request.guidance > 0:
            prompts.append(request.negative_prompt)
        known = self._encode_prompts([prompt for prompt in prompts if prompt is not None], plan)
        nothing = torch.zeros_like(known[request.prompt])
        return [nothing if prompt is None else known[prompt] for prompt in prompts]

    def _encode_prompts(self, prompts: Sequence[str], plan: Plan) -> dict[str, Tensor]:
        """Embeddings [1, L, text_dim] by prompt: those that are prepared or kept, and the others by the encoder."""
        found: dict[str, Tensor | None] = {prompt: self._prepared.get(prompt) for prompt in prompts}
        if self.embeddings is not None:
            found = {p: value if value is not None else self.embeddings.get(p) for p, value in found.items()}
        known = {prompt: value for prompt, value in found.items() if value is not None}
        missing = [prompt for prompt in found if prompt not in known]
        if missing:
            with self.model.use("text", plan.placement, plan.text_on_cpu) as text:
                for prompt in missing:
                    known[prompt] = text.encode([prompt])
                    if self.embeddings is not None:
                        self.embeddings.put(prompt, known[prompt])
        return known

    def _chunk(
        self,
        transformer: DiT,
        request: Request,
        plan: Plan,
        index: int,
        native: int,
        known: Tensor,
        texts: list[TextContext],
        report: Callable[[int, int, Tensor], None],
        edit: Edit | None = None,
        show: Watch | None = None,
    ) -> Tensor:
        """`native` frames of latents [1, C, T, H, W] from the noise of chunk `index`; the first ones are `known`.
        edit: what acts on them beside the text. show: is told after each step where it leads to."""
        count, sampling = known.shape[2], request.sampling
        shape = (1, known.shape[1], native, *known.shape[3:])
        noise = numpy_noise((request.seed + index) % 2**32, shape).to(self.device)
        latents = torch.cat([known, torch.zeros_like(noise[:, :, count:])], dim=2)
        given = FrameCondition(latents, count, sampling.conditional_timestep)
        controls = () if edit is None else edit.controls
        told = [*texts, TextContext.batched(texts)] if plan.side_by_side and len(texts) == 2 else texts
        conditions = [Conditions(text, frame_mask=given.mask, controls=controls) for text in told]
        networks = [lambda x, times, told=each: transformer(x, times, told) for each in conditions]
        if len(told) > len(texts):
            predict = side_by_side(networks[-1], len(texts), first=networks[0])
        else:
            predict = one_by_one(networks)
        schedule = self._schedule(sampling)
        if edit is not None:
            schedule = edit.shortened(schedule)
        interval = self.speed.guidance_interval
        velocity = guided_velocity(predict, given, noise, sampling.guidance, interval)
        budget = 0.0 if sampling.solver == "renoise" else self.speed.cache  # a distilled model's steps are no line
        jumps = guidance_jumps(schedule, interval) if len(texts) == 2 else []
        if edit is not None and edit.hold is not None:
            jumps.append(edit.hold_until + 1)
        cache = StepCache(velocity, schedule, budget, jumps)
        velocity, x = (cache, noise) if edit is None else edit.begin(cache, schedule, given, noise)
        if show is not None:
            velocity = watched(velocity, schedule, lambda step, x0: show(step, len(schedule), x0))
        with attention_kernel(self.speed, transformer, len(texts) if plan.side_by_side else 1, shape[2:], self.device):
            latents = solve(velocity, x, schedule, sampling.solver, report)
        self.spent.add(cache.evaluations, cache.skipped, cache.estimated_error)
        return latents

    @staticmethod
    def _offset(progress: Progress | None, index: int, chunks: int) -> Callable[[int, int, Tensor], None]:
        """The solver's callback for chunk `index`, as progress over all of them."""

        def report(done: int, steps: int, _latents: Tensor) -> None:
            if progress is not None:
                progress(index * steps + done, chunks * steps)

        return report

    def _decode(self, latents: Tensor, plan: Plan) -> Video:
        fps = self.config.fps
        with self.model.use("vae", plan.placement) as vae:
            if plan.tiled:
                return Video.from_tensor(decode_tiled(vae, latents), fps)
            latents = latents.to(self.model.vae_dtype)
            chunk = latents_at_once(vae, (latents.shape[3], latents.shape[4]))
            pieces = [Video.from_tensor(piece, fps).frames for piece in vae.decode_stream(latents, chunk)]
        return Video(np.concatenate(pieces), fps)
