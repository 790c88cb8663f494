"""The door that every format comes through, and the list of those that are built in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unmix.core.errors import FormatError
from unmix.core.plugins import Registry
from unmix.formats.draft import Draft
from unmix.formats.place import Place

FORMATS = Registry(
    "unmix.formats",
    "format",
    {
        "native": "unmix.formats.layouts.native:NativeFormat",
        "native_set": "unmix.formats.layouts.native:NativeSetFormat",
        "sae_lens": "unmix.formats.layouts.sae_lens:SaeLensFormat",
        "sae_lens_legacy": "unmix.formats.layouts.sae_lens_legacy:SaeLensLegacyFormat",
        "mats_sae_training": "unmix.formats.layouts.mats_sae_training:MatsFormat",
        "openai": "unmix.formats.layouts.openai:OpenAIFormat",
        "sparsify": "unmix.formats.layouts.sparsify:SparsifyFormat",
        "opensae": "unmix.formats.layouts.opensae:OpenSaeFormat",
        "e2e_sae": "unmix.formats.layouts.e2e_sae:E2eSaeFormat",
        "dictionary_learning": "unmix.formats.layouts.dictionary_learning:DictionaryLearningFormat",
        "dictionary_learning_crosscoder": "unmix.formats.layouts.dictionary_learning_crosscoder:CrosscoderFormat",
        "gemma_scope": "unmix.formats.layouts.gemma_scope:GemmaScopeFormat",
        "gemma_scope_2": "unmix.formats.layouts.gemma_scope_2:GemmaScope2Format",
        "gemma_scope_2_layers": "unmix.formats.layouts.gemma_scope_2_layers:GemmaScope2LayersFormat",
        "llama_scope": "unmix.formats.layouts.llama_scope:LlamaScopeFormat",
        "llamascopium": "unmix.formats.layouts.llamascopium:LlamascopiumFormat",
        "circuit_tracer": "unmix.formats.layouts.circuit_tracer:CircuitTracerFormat",
        "circuit_tracer_clt": "unmix.formats.layouts.circuit_tracer_clt:CircuitTracerCltFormat",
        "ckkissane": "unmix.formats.layouts.ckkissane:CkkissaneFormat",
        "qwen_scope": "unmix.formats.layouts.qwen_scope:QwenScopeFormat",
    },
)


class Format:
    """One published layout. One small file a format; adding one touches that file, its test and `FORMATS`."""

    name: str
    looks_for: str
    """What tells this layout from others, for messages."""
    writable: bool = False
    many: bool = False
    """Whether `write` takes several coders at once."""

    def recognise(self, place: Place) -> bool:
        """Whether the place holds this layout, by its files' names and content. Reads no weights, never raises."""
        raise NotImplementedError

    def coders(self, place: Place) -> tuple[str, ...]:
        """Names of the coders that a recognised place holds; one without a name by default."""
        return ("",)

    def joint(self, place: Place) -> bool:
        """Whether the coders of the place write together, their writes adding up (a `CoderSet`)."""
        return False

    def read(self, place: Place, name: str = "") -> Draft:
        """One coder of a recognised place, its tensors not made yet. `FormatError` where something does not fit."""
        raise NotImplementedError

    def write(self, drafts: Mapping[str, Draft], folder: Path) -> None:
        """Write coders (one, unless `many`) to an empty folder; `FormatError` for what the layout cannot say."""
        raise FormatError(f"the format {self.name!r} can be read but not written")


class FileFormat(Format):
    """A layout with one coder a file: a place is one of them, or a folder with any number."""

    def files(self, place: Place) -> list[str]:
        """The files of a place that hold this layout, by their paths in its folder."""
        raise NotImplementedError

    def called(self, file: str) -> str:
        """The name of a file's coder, where there are several."""
        return Path(file).stem

    def recognise(self, place: Place) -> bool:
        """By its files."""
        return bool(self.files(place))

    def coders(self, place: Place) -> tuple[str, ...]:
        """One a file; a single one has no name."""
        files = self.files(place)
        return ("",) if len(files) == 1 else tuple(map(self.called, files))

    def file_of(self, place: Place, name: str) -> str:
        """The file of one of `coders`."""
        return next(file for file in self.files(place) if not name or self.called(file) == name)


def format_of(name: str) -> Format:
    """The format called `name`; `ConfigError` naming the nearest where there is none."""
    made: Format = FORMATS.get(name)()
    return made
