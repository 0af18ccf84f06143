"""MLflow's gateway: a second real one, for ours to stand before, and to be measured against."""

from __future__ import annotations

VARIABLES = {  # of the server that holds it, before it starts
    "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_CRYPTO_KEK_PASSPHRASE": "a secret of the tests",
}


def add_endpoint(server: str, name: str, api_base: str, api_key: str) -> str:
    """Have an MLflow server pass a model's requests on to an OpenAI-shaped address; where it is asked itself."""
    from mlflow.entities.gateway_endpoint import GatewayEndpointModelConfig, GatewayModelLinkageType
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.utils.credentials import get_default_host_creds

    store = RestStore(lambda: get_default_host_creds(server))
    secret = store.create_gateway_secret(
        name, {"api_key": api_key}, provider="openai", auth_config={"api_base": api_base}
    )
    definition = store.create_gateway_model_definition(name, secret.secret_id, "openai", name)
    linked = GatewayEndpointModelConfig(
        model_definition_id=definition.model_definition_id, linkage_type=GatewayModelLinkageType.PRIMARY
    )
    store.create_gateway_endpoint(name, [linked], usage_tracking=True)
    return f"{server}/gateway/mlflow/v1"
