//! `/v1/models` across services: what the holder of a key may call, by the name to call it. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::snapshot::Service;

/// The list's JSON. A model is listed by its bare name where that leads to one service, else as `NAMESPACE/NAME`.
#[must_use]
pub fn list(visible: &[Arc<Service>]) -> String {
    let mut served: HashMap<&str, usize> = HashMap::new();
    for service in visible {
        *served.entry(&service.spec.model).or_default() += 1;
    }
    let data: Vec<Value> = visible
        .iter()
        .map(|service| {
            if served[service.spec.model.as_str()] == 1 {
                entry(service, service.spec.model.clone())
            } else {
                entry(service, service.spec.id.to_string())
            }
        })
        .collect();
    json!({"object": "list", "data": data}).to_string()
}

/// One model's JSON, by either of its names; `None` if the name leads to no service, or to several.
#[must_use]
pub fn card(visible: &[Arc<Service>], id: &str) -> Option<String> {
    let direct = visible.iter().find(|s| s.spec.id.to_string() == id);
    let service = direct.or_else(|| {
        let mut named = visible.iter().filter(|s| s.spec.model == id);
        let first = named.next()?;
        named.next().is_none().then_some(first)
    })?;
    Some(entry(service, id.to_owned()).to_string())
}

fn entry(service: &Service, id: String) -> Value {
    let spec = &service.spec;
    json!({"id": id, "object": "model", "created": spec.created, "owned_by": spec.id.namespace})
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::super::snapshot::testing::{service, snapshot};
    use super::*;

    #[test]
    fn every_listed_id_leads_to_one_service() {
        let world = snapshot(
            [
                service("a", "x", "llama"),
                service("a", "y", "mistral"),
                service("b", "z", "llama"),
            ],
            [],
        );
        let visible: Vec<_> = world.services().cloned().collect();
        let listed: Value = serde_json::from_str(&list(&visible)).unwrap();
        let ids: Vec<_> = listed["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["id"].as_str().unwrap())
            .collect();
        assert_eq!(ids, ["a/x", "mistral", "b/z"]);
        for id in &ids {
            let card: Value = serde_json::from_str(&card(&visible, id).unwrap()).unwrap();
            assert_eq!(card["id"], *id);
            assert_eq!(card["object"], "model");
        }
        assert!(card(&visible, "llama").is_none(), "two services serve it");
        assert!(card(&visible, "b/zz").is_none());
    }
}
