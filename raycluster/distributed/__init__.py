"""The only room that knows Ray: Data carries the images, actors hold the features, Train runs the workers."""
