package kafkaserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/segmentio/kafka-go"
)

// CreateTopic creates a topic and returns when every partition has a leader. config are settings of the topic, such as
// cleanup.policy.
func (s *Server) CreateTopic(ctx context.Context, name string, partitions int, config ...kafka.ConfigEntry) error {
	resp, err := s.client.CreateTopics(ctx, &kafka.CreateTopicsRequest{Topics: []kafka.TopicConfig{{
		Topic: name, NumPartitions: partitions, ReplicationFactor: 1, ConfigEntries: config,
	}}})
	if err == nil {
		err = resp.Errors[name]
	}
	if err != nil {
		return fmt.Errorf("create topic %s: %w", name, err)
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		meta, err := s.client.Metadata(ctx, &kafka.MetadataRequest{Topics: []string{name}})
		if err == nil && led(meta, partitions) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("create topic %s: wait for its leaders: %w", name, errors.Join(context.Cause(ctx), err))
		case <-tick.C:
		}
	}
}

func led(meta *kafka.MetadataResponse, partitions int) bool {
	if len(meta.Topics) != 1 || meta.Topics[0].Error != nil || len(meta.Topics[0].Partitions) != partitions {
		return false
	}
	for _, p := range meta.Topics[0].Partitions {
		if p.Error != nil || p.Leader.Port == 0 {
			return false
		}
	}
	return true
}

// DeleteTopic deletes a topic. One that does not exist is no error.
func (s *Server) DeleteTopic(ctx context.Context, name string) error {
	resp, err := s.client.DeleteTopics(ctx, &kafka.DeleteTopicsRequest{Topics: []string{name}})
	if err == nil {
		err = resp.Errors[name]
	}
	if err != nil && !errors.Is(err, kafka.UnknownTopicOrPartition) {
		return fmt.Errorf("delete topic %s: %w", name, err)
	}
	return nil
}

// Allow lets a user of Config.Users do the operations on a topic; Read and Write include Describe.
//
// A kafka-go Writer tells a user who may describe a topic but not write to it kafka.TopicAuthorizationFailed. A user
// who may not even describe it is told kafka.UnknownTopicOrPartition, because the transport asks for the metadata of
// all topics and the broker leaves this one out; if Transport.MetadataTopics names it, the answer is
// TopicAuthorizationFailed.
func (s *Server) Allow(ctx context.Context, user, topic string, operations ...kafka.ACLOperationType) error {
	var acls []kafka.ACLEntry
	for _, op := range operations {
		acls = append(acls, kafka.ACLEntry{
			ResourceType: kafka.ResourceTypeTopic, ResourceName: topic, ResourcePatternType: kafka.PatternTypeLiteral,
			Principal: "User:" + user, Host: "*", Operation: op, PermissionType: kafka.ACLPermissionTypeAllow,
		})
	}
	resp, err := s.client.CreateACLs(ctx, &kafka.CreateACLsRequest{ACLs: acls})
	if err == nil {
		err = errors.Join(resp.Errors...)
	}
	if err != nil {
		return fmt.Errorf("allow user %s on topic %s: %w", user, topic, err)
	}
	return nil
}
