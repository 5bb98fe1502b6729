"""Speed, as ratios measured in one run. The last line each script prints is JSON."""
