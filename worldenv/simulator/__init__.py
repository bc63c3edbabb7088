"""The imagined world: EVAC's latent video diffusion, from memory frames and action maps to frames."""
