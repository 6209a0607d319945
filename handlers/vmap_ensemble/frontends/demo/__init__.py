"""A web page on one's own machine to try an archive with: `vmap-ensemble demo x.mar`."""
