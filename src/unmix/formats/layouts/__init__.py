"""One small file a published layout, all of the same shape; `unmix.formats.registry.FORMATS` lists them."""
