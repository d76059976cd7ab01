"""What is built on the chain: the command line, masks of custom images, VOC submissions, the ablation."""
