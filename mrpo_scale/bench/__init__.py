"""`mrpo bench`: what a step of MRPO costs over one of DPO, measured on the training step itself."""
