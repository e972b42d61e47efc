"""The predictions of a run's student or teacher for any number of images, on the cluster."""
