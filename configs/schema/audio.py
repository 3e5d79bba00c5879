"""How recordings, and the spoken tracks of videos, are listened to."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.configs.errors import UserError
from crossguard.configs.schema.checks import at_least, one_of, within
from crossguard.configs.schema.encoders import EncoderConfig

# Samples a second that sound is turned into, in one channel: what Whisper and wav2vec 2.0 were trained with.
SAMPLE_RATE = 16_000
LOG_MEL, WAVEFORM = "log_mel", "waveform"
# Frames of a spectrogram, and of those the ones that Whisper's encoder makes one token of.
FRAMES_PER_SECOND, FRAMES_PER_POSITION = 100, 2


@dataclass
class AudioEncoderConfig(EncoderConfig):
    """The encoder of sound: of an encoder-decoder (Whisper) its encoder."""

    # What it reads: `log_mel`, spectrograms as Whisper's, or `waveform`, as wav2vec 2.0, HuBERT, WavLM and XLS-R.
    features: str = LOG_MEL
    # Mel bins of a spectrogram: 80, or 128 (whisper-large-v3).
    mel_bins: int = 80
    # Seconds listened to, from the start; Whisper's encoders were made for 30.
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        self.check_encoder("model.audio")
        one_of("model.audio.features", self.features, (LOG_MEL, WAVEFORM))
        at_least("model.audio.mel_bins", self.mel_bins, 1)
        within("model.audio.max_seconds", self.max_seconds, 0.1, 3600)

    @property
    def positions(self) -> int:
        """Tokens that an encoder of spectrograms makes of a recording of `max_seconds`."""
        return round(self.max_seconds * FRAMES_PER_SECOND / FRAMES_PER_POSITION)

    def check_sizes(self) -> None:
        """An encoder of spectrograms that is described here must be made for `mel_bins` and `max_seconds`."""
        if self.features == LOG_MEL:
            for name, value, key in (
                ("num_mel_bins", self.mel_bins, f"mel_bins={self.mel_bins}"),
                ("max_source_positions", self.positions, f"max_seconds={self.max_seconds}"),
            ):
                made_for = self.config.get(name, value)
                if isinstance(made_for, int) and made_for != value:
                    raise UserError(
                        f"model.audio.{key}: the encoder was made for {made_for} instead of {value}"
                        f" (model.audio.config.{name}); leave that out"
                    )
