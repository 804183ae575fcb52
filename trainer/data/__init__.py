"""From a data set's samples to batches on the device: data sets, transforms, order, loading, feeding."""
