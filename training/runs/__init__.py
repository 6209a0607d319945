"""What the commands of `training` do once their options are read."""
