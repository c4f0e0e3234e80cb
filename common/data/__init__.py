"""Images: data sets, folders, decoding, augmentation and corruptions."""
