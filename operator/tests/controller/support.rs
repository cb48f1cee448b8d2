//! Services from the examples, and an API server that answers as told.

use std::path::Path;

use ashlar_crds::InferenceService;
use ashlar_operator::controller::{
    build::Defaults,
    validate::{ValidatedService, validate},
};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tower_test::mock;

/// An example as the API server would hand it to the controller.
pub fn example(name: &str) -> InferenceService {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../crds/examples/{name}.yaml"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut service: InferenceService = serde_yaml_ng::from_str(&text).unwrap();
    service.metadata.namespace = Some("chat".into());
    service.metadata.uid = Some("uid-1".into());
    service.metadata.generation = Some(1);
    service
}

pub fn validated(service: &InferenceService) -> ValidatedService {
    validate(service).unwrap()
}

pub fn defaults() -> Defaults {
    Defaults {
        runtime_image: "ashlar/runtime:1".into(),
        runtime_image_cuda: "ashlar/runtime:1-cuda".into(),
        namespace: "ashlar-system".into(),
        gateway_service: "ashlar-gateway".into(),
        cluster_domain: "cluster.local".into(),
        metrics_from: vec![],
    }
}

/// The API server's side of a client.
pub struct Server(mock::Handle<Request<Body>, Response<Body>>);

pub fn api() -> (Client, Server) {
    let (service, handle) = mock::pair::<Request<Body>, Response<Body>>();
    (Client::new(service, "default"), Server(handle))
}

impl Server {
    /// Expects `METHOD path`, answers it, and returns the request's query and body.
    pub async fn answers(&mut self, call: &str, code: u16, body: Value) -> (String, Value) {
        let (request, reply) = self.0.next_request().await.expect("a call");
        let (method, uri) = (request.method().clone(), request.uri().clone());
        assert_eq!(format!("{method} {}", uri.path()), call);
        let sent = request.into_body().collect().await.unwrap().to_bytes();
        let response = Response::builder().status(code);
        reply.send_response(
            response
                .body(Body::from(body.to_string().into_bytes()))
                .unwrap(),
        );
        let sent = serde_json::from_slice(&sent).unwrap_or(Value::Null);
        (uri.query().unwrap_or_default().to_owned(), sent)
    }

    pub async fn fails(&mut self, call: &str, code: u16) -> (String, Value) {
        let reason = if code == 404 { "NotFound" } else { "AsTold" };
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "as told"});
        self.answers(call, code, status).await
    }

    /// Nothing more is asked once the client is gone.
    pub async fn finish(mut self) {
        assert!(self.0.next_request().await.is_none(), "one call too many");
    }
}
