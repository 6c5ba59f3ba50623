"""From a request to a published target: grow, certify, describe, rename."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from threading import Event
from typing import TYPE_CHECKING, Any

from aquilamoe import format
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.schema import UpcyclingConfig
from aquilamoe.files import write_atomically
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.shrink import shrink
from aquilamoe.growth.tool import card, comparison, held_out, identity, output, plan, unchanged
from aquilamoe.growth.tool.held_out import HeldOut
from aquilamoe.growth.tool.output import TargetFolder
from aquilamoe.growth.tool.reporter import Reporter
from aquilamoe.growth.tool.request import Request, open_checkpoint
from aquilamoe.pipeline.store import to_json
from aquilamoe.process import errors, interruption

if TYPE_CHECKING:
    from aquilamoe.growth.reduction import Reduction
    from aquilamoe.growth.split import Split

# Card, record, tokenizer and what file systems keep for themselves.
SLACK_BYTES = 64 * 10**6
STARTS_OVER = "nothing was kept; the same command starts over"
CONTINUES = "the weights are kept beside the target; the same command continues with the certificate"


class Making:
    """One target in the making. `seconds` are what its parts took so far, which is no part of what it is."""

    def __init__(
        self, reporter: Reporter, request: Request, config: GrowConfig, command: str, place: TargetFolder
    ) -> None:
        self.reporter = reporter
        self.request = request
        self.config = config
        self.command = command
        self.place = place
        self.seconds: dict[str, float] = {}
        self._is_grown = False
        self._split: Split | None = None

    def run(self) -> dict[str, Any]:
        """Publish the target and return its record. What fails leaves nothing; what is interrupted can continue."""
        started = time.time()
        try:
            with errors.at(self.request.target):
                record = self._make()
                interruption.check()
                run = {"started": started, "seconds": time.time() - started, **self.seconds}
                write_atomically(self.place.partial / output.RUN, to_json(run, str(self.request.target)) + "\n")
                self.place.publish(record)
        except KeyboardInterrupt:
            if not self._is_grown:
                self.place.discard()
            raise KeyboardInterrupt(CONTINUES if self._is_grown else STARTS_OVER) from None
        except BaseException:
            self.place.discard()
            raise
        return record

    def _make(self) -> dict[str, Any]:
        """Fill the directory; return the record."""
        text = self._held_out()  # errors in it are reported before anything is written
        note = self.place.grown()
        if note is not None and not identity.changes(self.request, note):
            self.reporter.note("grow", "done by an earlier, interrupted run")
        else:
            self.place.discard()
            note = self._grow()
        self._is_grown = True
        record = self._describe(note, self._certify(text))
        page = card.render(self.request, self.config, self.command, record, record["recipe"]["inputs"])
        (self.place.partial / card.CARD).write_text(page, encoding="utf-8")
        return record

    def _held_out(self) -> HeldOut | None:
        if not self.config.certificate.enabled or self.request.texts:
            return None
        source, settings = (
            self.request.source,
            comparison.settings_for(self.request.growth, self.config.certificate),
        )
        return held_out.read(source.directory, source.model, settings, self.config.seed)

    def _grow(self) -> dict[str, Any]:
        """Write all tensors of the target; return what is known of them. The source's files are hashed meanwhile."""
        self.place.check_space(plan.target_bytes(self.request) + SLACK_BYTES)
        for source in self.request.directories:
            unchanged.check(source)
        stop = Event()
        with ThreadPoolExecutor(max_workers=1) as aside:
            digests = aside.submit(identity.inputs, self.request, stop)
            try:
                tensors = self._grow_tensors()
                recipe = identity.recipe(self.request, digests.result())
                note = {"fingerprint": identity.identity(recipe), "recipe": recipe, "tensors": tensors}
            except BaseException:
                stop.set()
                raise
        self.place.note_grown(note)
        return note

    def _grow_tensors(self) -> dict[str, str]:
        """SHA-256 of every tensor that the engine wrote."""
        request = self.request
        source, target = request.source.directory, self.place.partial
        grow: Any
        if request.others:
            grow = self._mix()
        elif request.kind == "shrink":
            grow = partial(shrink, source, target, request.model, self._reduced())
        else:
            grow = scale_up if request.kind == "scale_up" else scale_out
            grow = partial(grow, source, target, request.model, request.growth, request.seed)
        if (split := self._calibrated()) is not None:
            grow = partial(grow, split=split)
        name = "shrink" if request.kind == "shrink" else "grow"
        with self.reporter.step(name, "tensors", plan.target_bytes(request)) as bar:
            tensors = grow(progress=bar.update, dtype_policy=request.dtype_policy)
            self.seconds["grow_s"] = bar.seconds
            written = plan.target_bytes(request)
            rate = format.size_or_absent(int(written / max(bar.seconds, 1e-3)))
            bar.end(f"{format.size_or_absent(written)} in {format.duration(bar.seconds)}, {rate}/s, on disk")
        return dict(tensors)

    def _reduced(self) -> "Reduction":
        """What stays of the source, of a shrink."""
        with self.reporter.step("compare", "layers") as bar:
            found = self.request.find_reduction(bar.update)
            bar.end(f"units of {len(found.layers)} layers in {format.duration(bar.seconds)}")
        return found

    def _mix(self) -> Any:
        """What writes a mix, whose routers may be found from text first."""
        from aquilamoe.growth import mix

        request, growth = self.request, self.request.growth
        assert isinstance(growth, UpcyclingConfig)
        write = partial(mix.mix, request.directories, self.place.partial, request.model, growth, request.seed)
        if growth.router_init not in mix.FITTED:
            return write
        import torch

        from aquilamoe.growth import mix_router

        texts = [torch.from_numpy(text.tokens_bt[:, :-1]) for text in self._texts("train")]
        with self.reporter.step("calibrate", "layers") as bar:
            routers = mix_router.fit(
                request.directories, request.model, growth, request.seed, texts, progress=bar.update
            )
            bar.end(f"{sum(text.numel() for text in texts):,} tokens in {format.duration(bar.seconds)}")
        return partial(write, routers=routers)

    def _texts(self, split: str) -> list[HeldOut]:
        """The text of each source of a mix: for its router, or held out."""
        request, settings = self.request, self.config.certificate
        tokens, length = getattr(request.growth, "calibration_tokens", 0), held_out.CALIBRATION_LENGTH
        if split == "validation":
            tokens = comparison.settings_for(request.growth, settings).tokens
            length = settings.sequence_length
        return [held_out.of_source(request, text, tokens, length, split=split) for text in request.texts]

    def _calibrated(self) -> "Split | None":
        """What separates the copies of an expert, of a split; found once."""
        request, growth = self.request, self.request.growth
        if not isinstance(growth, UpcyclingConfig) or growth.method != "split" or self._split is not None:
            return self._split
        import torch

        from aquilamoe.growth.split import calibrate

        source, count = request.source, growth.calibration_tokens or 0
        tokens_bt = None
        if count:
            ids = held_out.calibration(source.directory, source.model, request.calibration_text, count, request.seed)
            tokens_bt = torch.from_numpy(ids)
        with self.reporter.step("calibrate", "layers") as bar:
            self._split = calibrate(
                source.directory, request.model, growth, request.seed, tokens_bt, progress=bar.update
            )
            read = 0 if tokens_bt is None else tokens_bt.numel()
            bar.end(f"{read:,} tokens in {format.duration(bar.seconds)}")
        return self._split

    def _certify(self, text: HeldOut | None) -> dict[str, Any] | None:
        if self.request.texts and self.config.certificate.enabled:
            return self._certify_mix()
        if text is None:
            return None
        began = time.monotonic()
        target = open_checkpoint("target", self.place.partial)
        request, settings = self.request, self.config.certificate
        # Where the growth was done by an earlier run, its directions are found again if the claim needs them.
        split = self._calibrated() if request.preserving else None
        known = comparison.known(request.growth)
        claim = Claim(
            preserving=request.preserving,
            tolerance=comparison.tolerance(request.source, settings, known, target),
            growth=known,
            seed=request.seed,
            split=split,
        )
        certificate = comparison.compare(self.reporter, request.source, target, text=text, claim=claim)
        self.seconds["certificate_s"] = time.monotonic() - began
        return certificate

    def _certify_mix(self) -> dict[str, Any]:
        import torch

        from aquilamoe.growth import mix_certificate

        request, texts = self.request, self._texts("validation")
        named = [(text.text, torch.from_numpy(text.tokens_bt)) for text in texts]
        assert isinstance(request.growth, UpcyclingConfig)
        tolerance = comparison.tolerance(request.source, self.config.certificate, request.growth)
        with self.reporter.step("certificate", "layers") as bar:
            certificate = mix_certificate.certify(
                request.directories, self.place.partial, named, tolerance=tolerance, progress=bar.update
            )
            self.seconds["certificate_s"] = bar.seconds
            bar.end(f"{certificate['tokens']:,} tokens in {format.duration(bar.seconds)}")
        return {**certificate, "text": f"held out of {', '.join(text.text for text in texts)}"}

    def _describe(self, note: Mapping[str, Any], certificate: Mapping[str, Any] | None) -> dict[str, Any]:
        """All that is known of the target. No time is in it: made again, it is the same."""
        request = self.request
        return {
            "fingerprint": note["fingerprint"],
            "recipe": note["recipe"],
            "source": {
                "name": card.checkpoint_name(request.source.directory),
                "model": request.source.model.model_dump(mode="json"),
                **(
                    {"others": [card.checkpoint_name(path) for path in request.directories[1:]]}
                    if request.others
                    else {}
                ),
            },
            "params_total": request.model.num_params,
            "params_active": request.model.num_active_params,
            "preserving": request.preserving,
            "certificate": certificate,
            "tensors": note["tensors"],
            "versions": {package: version(package) for package in ("aquilamoe", "torch")},
        }
