"""The block-by-block walk that every calibrated weight technique shares."""
