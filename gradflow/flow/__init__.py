"""The flow θ' = −∇F(θ) − λ∇R(θ), as Diffrax and as linear algebra see it."""
