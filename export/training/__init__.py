"""Training what bundles hold: the compact backbone and the upsampler."""
