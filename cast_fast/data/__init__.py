"""From files on disk to batches of crops on the device.

Read in this order: ``layout`` (what a dataset is) → ``saliency_crop`` (the crop rule) → ``sampling`` (global order and
random numbers) → ``dali_loader`` (the pipeline) → ``batch`` (what the training step receives).
"""
