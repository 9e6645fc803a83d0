"""Make training batches: where they are loaded, and how they are augmented on a device.

augmentation         augment images, consistently across the two views of a pair
batch_sources        load batches in threads or processes
published_draws      draw colours, filters and dropout as published
augmentation_draws   draw what augmentation does to each image; BatchDraws, the draws of a batch
jpeg_simulation      compress and decode batches as JPEG does, by matrix products
device_augmentation  augment a batch of images on any device

    batch = next(loader.load(query_ids, reference_ids, epoch=1))
    batch = batch.to(torch.device("cuda")).augment()
"""
