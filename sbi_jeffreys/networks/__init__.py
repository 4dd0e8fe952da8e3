"""Networks: builders of the main model, transforms, splines, and maximum-likelihood fits."""
