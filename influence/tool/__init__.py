"""Questions that people ask of a trained model, each answered by one call and one page."""
