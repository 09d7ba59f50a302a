"""Manifests of clusters for Glidepath: what Kubernetes (KubeRay) and Ray's cluster launcher are told to run."""
