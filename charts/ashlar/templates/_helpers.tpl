{{/* Labels that select a component's pods; never changed, as selectors are immutable. */}}
{{- define "ashlar.selectorLabels" -}}
app.kubernetes.io/name: ashlar
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of every object. Takes a dict of root and component; component may be empty. */}}
{{- define "ashlar.labels" -}}
app.kubernetes.io/name: ashlar
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/part-of: ashlar
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* An image reference: as it is with a tag or a digest, else with the chart's appVersion. */}}
{{- define "ashlar.image" -}}
{{- $last := splitList "/" .image | last -}}
{{- if or (contains ":" $last) (contains "@" $last) -}}
{{ .image }}
{{- else -}}
{{ printf "%s:%s" .image .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The part of a pod that operator and gateway share. Takes root, component, values. */}}
{{- define "ashlar.podMetadata" -}}
metadata:
  labels:
    {{- include "ashlar.selectorLabels" . | nindent 4 }}
    {{- with .values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .component }}
    {{- with .values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Where a pod runs and as whom. Takes root, component, values. */}}
{{- define "ashlar.podSpec" -}}
serviceAccountName: ashlar-{{ .component }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
affinity:
  {{- if .values.affinity }}
  {{- toYaml .values.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "ashlar.selectorLabels" . | nindent 14 }}
  {{- end }}
{{- end }}

{{/* What every container may do: nothing but run. */}}
{{- define "ashlar.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Environment that operator and gateway share. */}}
{{- define "ashlar.env" -}}
- name: ASHLAR_LOG
  value: {{ .Values.log.level | quote }}
- name: ASHLAR_LOG_FORMAT
  value: {{ .Values.log.format }}
- name: ASHLAR_CLUSTER_DOMAIN
  value: {{ .Values.clusterDomain }}
- name: ASHLAR_OPERATOR_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: ASHLAR_POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- end }}

{{/* Egress rules for DNS and the API server. */}}
{{- define "ashlar.egressBase" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}

{{/* Runtime pods of every namespace, as one NetworkPolicy peer. */}}
{{- define "ashlar.runtimePeer" -}}
namespaceSelector: {}
podSelector:
  matchExpressions:
    - {key: serving.ashlar.dev/service, operator: Exists}
{{- end }}

{{/* Pods of every namespace that fill claims with models. */}}
{{- define "ashlar.pullPeer" -}}
namespaceSelector: {}
podSelector:
  matchExpressions:
    - {key: serving.ashlar.dev/pull, operator: Exists}
{{- end }}
