//! What `status` says of replicas: none, a number that was decided, pods that wake.

use ashlar_crds::ScalingDecision;
use ashlar_operator::autoscaler::Outcome;

use super::{Scene, ready, said, unscheduled};

#[test]
fn zero_replicas_are_ready_only_after_the_model_was() {
    let mut scene = Scene::new("valid-smollm2", &[ready()]);
    let before = scene.status();
    scene = Scene::new("valid-smollm2", &[]);
    scene.service.spec.replicas = 0;
    assert_eq!(said(&scene.status(), "Ready").0, "False ScaledToZero");
    scene.service.status = Some(before);
    assert_eq!(said(&scene.status(), "Ready").0, "True ScaledToZero");
}

fn outcome(desired: i32, blind: Option<&str>) -> Outcome {
    Outcome {
        desired,
        last: Some(ScalingDecision {
            from: 1,
            to: desired,
            reason: "QueueDepth".into(),
            ..ScalingDecision::default()
        }),
        explanation: Some(format!("from 1 to {desired} replicas: 23 requests wait")),
        blind: blind.map(str::to_owned),
    }
}

#[test]
fn a_scaled_service_says_what_was_decided_and_what_cannot_be_seen() {
    let mut scene = Scene::new("valid-mistral-gpu", &[ready()]);
    scene.scaling = Some(outcome(5, None));
    let status = scene.status();
    let (verdict, message) = said(&status, "ScalingReady");
    assert_eq!(verdict, "True Available");
    assert!(message.contains("23 requests wait"), "{message}");
    let decision = status.scaling.unwrap().last_decision.unwrap();
    assert_eq!((decision.to, decision.reason.as_str()), (5, "QueueDepth"));

    scene.scaling = Some(outcome(5, Some("0 of 1 ready pods have answered")));
    let (verdict, message) = said(&scene.status(), "ScalingReady");
    assert_eq!(verdict, "False MetricsUnavailable");
    assert!(message.contains("0 of 1"), "{message}");

    let fixed = Scene::new("valid-smollm2", &[ready()]).status();
    assert_eq!(said(&fixed, "ScalingReady").0, "True FixedReplicas");
    assert_eq!(fixed.scaling.unwrap().last_decision, None);
}

#[test]
fn a_service_that_slept_is_ready_while_it_wakes_unless_its_pods_cannot_start() {
    let mut scene = Scene::new("valid-mistral-gpu", &[ready()]);
    let scaling = scene.service.spec.scaling.as_mut().unwrap();
    scaling.min_replicas = 0;
    scene.service.status = Some(scene.status());
    let mut asleep = Scene::new("valid-mistral-gpu", &[]);
    asleep.service = scene.service.clone();
    asleep.wanted = Some(0);
    let status = asleep.status();
    let (verdict, message) = said(&status, "Ready");
    assert_eq!(verdict, "True ScaledToZero");
    assert!(message.contains("wakes the service"), "{message}");

    asleep.service.status = Some(status);
    asleep.wanted = Some(1);
    let waking = asleep.status();
    assert_eq!(said(&waking, "Ready").0, "True WakingUp");
    let mut stuck = Scene::new(
        "valid-mistral-gpu",
        &[unscheduled("Insufficient nvidia.com/gpu.")],
    );
    stuck.service = asleep.service.clone();
    stuck.service.status = Some(waking);
    stuck.wanted = Some(1);
    assert_eq!(said(&stuck.status(), "Ready").0, "False InsufficientGPU");
}
