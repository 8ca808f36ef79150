"""Captioning and filtering of web images (CapFilt), as BLIP-2 did it (Sec. 3.4): see `train.capfilt.run`."""
