"""Questions about a trained model and its training rows. One call and one page answer each."""
