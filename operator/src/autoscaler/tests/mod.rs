//! From the cluster as the caches show it to an outcome.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use serde_json::json;

use super::*;

fn service(scaling: serde_json::Value, status: serde_json::Value) -> InferenceService {
    serde_json::from_value(json!({
        "apiVersion": "serving.ashlar.dev/v1alpha1", "kind": "InferenceService",
        "metadata": {"name": "m", "namespace": "chat", "uid": "u"},
        "spec": {"model": {"uri": "hf://a/b"}, "endpoint": {"auth": "None"}, "scaling": scaling},
        "status": status,
    }))
    .unwrap()
}

fn world(service: &InferenceService) -> World {
    World {
        services: vec![Arc::new(service.clone())],
        pods: Vec::new(),
        gateway_slices: Vec::new(),
    }
}

#[test]
fn a_new_service_starts_with_what_it_takes_to_answer() {
    let of = |min: i32| {
        initial(&service(
            json!({"minReplicas": min, "maxReplicas": 8}),
            json!({}),
        ))
    };
    assert_eq!((of(0), of(1), of(3)), (1, 1, 3));
}

#[test]
fn a_new_leader_goes_on_where_the_old_one_was() {
    let status = json!({"scaling": {"desiredReplicas": 5}});
    let scaled = service(json!({"minReplicas": 0, "maxReplicas": 8}), status.clone());
    assert_eq!(initial(&scaled), 5);
    assert_eq!(
        initial(&service(
            json!({"minReplicas": 0, "maxReplicas": 3}),
            status
        )),
        3
    );
    let asleep = service(
        json!({"minReplicas": 0, "maxReplicas": 8}),
        json!({"scaling": {"desiredReplicas": 0}}),
    );
    assert_eq!(initial(&asleep), 0);

    let autoscaler = Autoscaler::new(&Registry::new(), 8081, Trust::none()).unwrap();
    autoscaler.tick(&world(&scaled));
    assert_eq!(autoscaler.outcome(&scaled).unwrap().desired, 5);
}

#[test]
fn without_metrics_the_outcome_says_so_once() {
    let scaled = service(json!({"minReplicas": 1, "maxReplicas": 8}), json!({}));
    let mut autoscaler = Autoscaler::new(&Registry::new(), 8081, Trust::none()).unwrap();
    assert_eq!(
        autoscaler.tick(&world(&scaled)).len(),
        0,
        "nobody can have answered yet"
    );
    autoscaler.began = autoscaler
        .began
        .checked_sub(Duration::from_secs(5))
        .unwrap();
    assert_eq!(autoscaler.tick(&world(&scaled)).len(), 1);
    assert!(
        autoscaler
            .outcome(&scaled)
            .unwrap()
            .blind
            .unwrap()
            .contains("no gateway")
    );
    assert_eq!(autoscaler.tick(&world(&scaled)).len(), 0);
}

#[test]
fn what_is_gone_is_forgotten() {
    let autoscaler = Autoscaler::new(&Registry::new(), 8081, Trust::none()).unwrap();
    let scaled = service(json!({"minReplicas": 1, "maxReplicas": 8}), json!({}));
    autoscaler.tick(&world(&scaled));
    assert!(autoscaler.figures(&scaled).is_some());
    let none = World {
        services: Vec::new(),
        ..world(&scaled)
    };
    autoscaler.tick(&none);
    assert!(autoscaler.figures(&scaled).is_none());
    assert!(autoscaler.outcome(&scaled).is_none());
}

#[test]
fn what_is_told_of_a_service_is_its_last_decision_and_counts_of_all() {
    let autoscaler = Autoscaler::new(&Registry::new(), 8081, Trust::none()).unwrap();
    let at = |min: i32| {
        let scaled = service(json!({"minReplicas": min, "maxReplicas": 8}), json!({}));
        autoscaler.tick(&world(&scaled));
        let (figures, mut text) = (autoscaler.figures(&scaled).unwrap(), String::new());
        for family in &FAMILIES {
            family.append(&figures, ("chat", "m"), &mut false, &mut text);
        }
        text
    };
    let (first, raised) = (at(1), at(3));
    let bounds = |count: u32| {
        format!(
            "ashlar_autoscaler_decisions_total{{name=\"m\",namespace=\"chat\",reason=\"Bounds\"}} {count}\n"
        )
    };
    let desired = |count: u32| {
        format!("ashlar_autoscaler_desired_replicas{{name=\"m\",namespace=\"chat\"}} {count}\n")
    };
    assert!(
        first.contains(&bounds(0)) && first.contains(&desired(1)),
        "{first}"
    );
    assert!(
        raised.contains(&bounds(1)) && raised.contains(&desired(3)),
        "{raised}"
    );
    assert!(
        !first.contains("ashlar_autoscaler_signal{"),
        "nobody has answered: {first}"
    );
}

#[test]
fn gateways_are_asked_while_they_serve() {
    let slice: EndpointSlice = serde_json::from_value(json!({
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false}},
        ],
    }))
    .unwrap();
    let autoscaler = Autoscaler::new(&Registry::new(), 8081, Trust::none()).unwrap();
    assert_eq!(autoscaler.gateway_targets(&[Arc::new(slice)]).len(), 2);
}

#[test]
fn gateways_add_up_and_while_one_is_silent_the_sum_is_not_fresh() {
    let key = ("chat".to_owned(), "m".to_owned());
    let load = GatewayLoad {
        held: 2.0,
        in_flight: 3.0,
        ended: 4.0,
    };
    let loads = Arc::new(HashMap::from([(key.clone(), load)]));
    let some = |age: f64| Some((Arc::clone(&loads), age));
    assert_eq!(together(&[], &key), Signal::Absent);
    assert_eq!(together(&[some(0.1), None], &key), Signal::Stale(load));
    assert_eq!(together(&[some(20.0), None], &key), Signal::Absent);
    let sum = GatewayLoad {
        held: 4.0,
        in_flight: 6.0,
        ended: 8.0,
    };
    assert_eq!(together(&[some(0.1), some(0.2)], &key), Signal::Fresh(sum));
    assert_eq!(together(&[some(0.1), some(5.0)], &key), Signal::Stale(sum));
    let other = ("chat".to_owned(), "other".to_owned());
    assert_eq!(
        together(&[some(0.1)], &other),
        Signal::Fresh(GatewayLoad::default())
    );
}
