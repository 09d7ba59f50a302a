"""Networks as plain `nn.Module`s: what is trained, with nothing of how. Imports only `data_pipeline`."""
