"""Middle floor: models, diffusion, recipes, engine, checkpoint, loop. Imports only `data_pipeline`."""
