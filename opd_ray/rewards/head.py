"""The regression head that LAION's aesthetic predictor and ImageReward share."""

from torch import Tensor, nn

__all__ = ["Head"]


class Head(nn.Module):
    """Five linear layers down to one number, with nothing but dropout between them: affine in eval mode.

    Source: improved-aesthetic-predictor (LAION), whose names of tensors are kept.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, width] to [B]."""
        score: Tensor = self.layers(features).squeeze(-1)
        return score
