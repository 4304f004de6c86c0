"""One file per way of fusing a modality with a frozen decoder."""
